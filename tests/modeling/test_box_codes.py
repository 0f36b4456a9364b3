"""Box codes of dense heads, and the loss of the distribution over distances."""

import pytest
import torch

from co_detr.modeling.auxiliary import DeltaCode, DistanceCode, DistributionCode
from co_detr.modeling.auxiliary.dense_losses import distribution_focal_loss
from tests.modeling.builders import random_boxes


@pytest.mark.parametrize(
    "code",
    [DeltaCode(), DeltaCode((10.0, 10.0, 5.0, 5.0)), DistanceCode()],
    ids=lambda code: type(code).__name__,
)
def test_codes_there_and_back(code):
    boxes = random_boxes(20, (96, 128), torch.Generator().manual_seed(0))
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2 + 2
    anchors = torch.cat([centers - 8, centers + 8], 1)
    torch.testing.assert_close(code.decode(code.encode(boxes, anchors), anchors), boxes)


def test_distribution_code():
    code = DistributionCode(max_distance=4, anchor_scale=2.0)
    anchor = torch.tensor([[0.0, 0.0, 32.0, 32.0]])  # stride 16
    logits = torch.full((1, 4, 5), -1e4)
    for side, distance in enumerate((0, 1, 2, 4)):
        logits[0, side, distance] = 0.0
    logits[0, 2, 3] = 0.0  # half of 2, half of 3
    box = code.decode(logits.flatten(1), anchor)
    assert box.tolist() == [[16.0, 0.0, 16 + 2.5 * 16, 16 + 4 * 16]]
    torch.testing.assert_close(code.encode(box, anchor), torch.tensor([[0.0, 1.0, 2.5, 4.0]]))
    assert code.decode(logits.flatten(1)[:0], anchor[:0]).shape == (0, 4)


def test_distribution_focal_loss_is_least_at_the_two_bins():
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0]).expand(5, 4)
    log_shares = logits[0].log_softmax(-1)
    distances = torch.tensor([1.0, 1.25, 3.0, 7.0, -1.0])
    expected = [1, None, 3, 3, 0]
    losses = distribution_focal_loss(logits, distances)
    for loss, bin_ in zip(losses, expected, strict=True):
        between = 0.75 * log_shares[1] + 0.25 * log_shares[2]
        torch.testing.assert_close(loss, -(between if bin_ is None else log_shares[bin_]))
