"""Box arithmetic and sine encodings against their definitions."""

import math

import pytest
import torch
from torchvision.ops import generalized_box_iou

from co_detr.errors import ConfigError
from co_detr.modeling import SinePosition
from co_detr.modeling.geometry import encode_boxes
from co_detr.modeling.losses import cxcywh_to_xyxy, generalized_iou, normalize_boxes, xyxy_to_cxcywh
from co_detr.modeling.transformer import inverse_sigmoid
from tests.modeling.builders import factor_of, random_boxes


def boxes(number, seed=0):
    return random_boxes(number, (90, 160), torch.Generator().manual_seed(seed), 1.0).double()


def test_conversions_round_trip():
    xyxy = boxes(50)
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(xyxy)), xyxy)
    assert xyxy_to_cxcywh(torch.tensor([10.0, 20.0, 30.0, 60.0])).tolist() == [20, 40, 20, 40]
    assert cxcywh_to_xyxy(torch.tensor([[20.0, 40.0, 20.0, 40.0]])).tolist() == [[10, 20, 30, 60]]


def test_normalizing_divides_by_width_and_height():
    normalized = normalize_boxes(torch.tensor([[16.0, 9.0, 48.0, 81.0]]), factor_of((90, 160)))
    torch.testing.assert_close(normalized, torch.tensor([[0.2, 0.5, 0.2, 0.8]]))


def test_generalized_iou_equals_torchvision():
    first, second = boxes(40), boxes(30, seed=1)
    expected = generalized_box_iou(first, second)
    torch.testing.assert_close(generalized_iou(first[:, None], second[None]), expected)
    assert expected.min() < -0.5 and expected.max() > 0.5
    torch.testing.assert_close(generalized_iou(first, first), torch.ones(40).double())


def test_generalized_iou_of_degenerate_boxes_is_a_number():
    point = torch.tensor([[5.0, 5.0, 5.0, 5.0]], requires_grad=True)
    for other in (point.detach(), torch.tensor([[7.0, 7.0, 9.0, 9.0]])):
        value = generalized_iou(point, other)
        assert value.isfinite().all() and (-1 <= value).all() and (value <= 1).all()
        (gradient,) = torch.autograd.grad(value.sum(), point)
        assert gradient.isfinite().all()


def test_inverse_sigmoid():
    x = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x).sigmoid(), x)
    torch.testing.assert_close(inverse_sigmoid(x), torch.logit(x))
    outside = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    bound = math.log(1e5)
    torch.testing.assert_close(
        inverse_sigmoid(outside), torch.tensor([-bound, -bound, bound, bound])
    )
    near = torch.tensor([1e-3, 1 - 1e-3])
    # Each side of the fraction is bounded by itself: log(0.01 / 0.999), not logit(0.01).
    torch.testing.assert_close(
        inverse_sigmoid(near, eps=1e-2), math.log(0.01 / 0.999) * torch.tensor([1.0, -1.0])
    )


def naive_sine(angle, index, num_features, temperature):
    frequency = temperature ** (2 * (index // 2) / num_features)
    return (math.cos if index % 2 else math.sin)(angle / frequency)


def test_sine_position_by_its_definition():
    mask = torch.zeros(1, 3, 5, dtype=torch.bool)
    mask[:, 2:] = True
    mask[:, :, 4:] = True  # 2 x 4 cells are inside
    encoding = SinePosition(8, temperature=20.0, offset=-0.5)(mask, torch.float64)
    assert encoding.shape == (1, 8, 3, 5)
    for row in range(2):
        for column in range(4):
            for channel in range(8):
                extent, cell = (2, row) if channel < 4 else (4, column)
                angle = (cell + 0.5) / (extent + 1e-6) * 2 * math.pi
                expected = naive_sine(angle, channel % 4, 4, 20.0)
                assert encoding[0, channel, row, column].item() == pytest.approx(expected)


def test_sine_position_ignores_padding_and_differs_everywhere():
    position = SinePosition(32)
    alone = position(torch.zeros(1, 6, 9, dtype=torch.bool))
    mask = torch.ones(1, 8, 16, dtype=torch.bool)
    mask[:, :6, :9] = False
    assert torch.equal(position(mask)[:, :, :6, :9], alone)
    cells = alone.flatten(2)[0].T
    assert torch.pdist(cells).min() > 1e-2
    with pytest.raises(ConfigError, match="divisible by 4, got 30"):
        SinePosition(30)


def test_box_code_by_its_definition():
    box = torch.tensor([[[0.1, 0.4, 0.7, 0.25]]], dtype=torch.float64)
    code = encode_boxes(box, 6)
    assert code.shape == (1, 1, 24)
    for channel in range(24):
        angle = box[0, 0, channel // 6].item() * 2 * math.pi
        expected = naive_sine(angle, channel % 6, 6, 10000.0)
        assert code[0, 0, channel].item() == pytest.approx(expected)
