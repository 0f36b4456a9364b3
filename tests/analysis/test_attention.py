"""What the decoder attends to: splatting, capturing without a trace, and the section."""

import json
import math

import pytest
import torch
from torch import nn

from co_detr.errors import AnalysisError
from co_detr.layers.deformable_attention import ms_deform_attn_reference
from co_detr.tools.analyze.attention import (
    attention_maps,
    captured_attention,
    measure_attention,
    splat,
)
from tests.analysis.cases import encoder_only_subject, plain, tiny_samples, tiny_subject


def _points(number=40, seed=0, low=-0.3, high=1.3):
    generator = torch.Generator().manual_seed(seed)
    locations = torch.rand(number, 2, generator=generator, dtype=torch.float64)
    weights = torch.rand(number, generator=generator, dtype=torch.float64)
    return low + (high - low) * locations, weights


def test_splat_against_a_loop():
    (height, width), (locations, weights) = (5, 7), _points()
    expected = torch.zeros(height, width, dtype=torch.float64)
    for (x, y), weight in zip(locations.tolist(), weights.tolist(), strict=True):
        for row in range(height):
            for column in range(width):
                # The hat function of the cell whose center is at (column + 0.5, row + 0.5).
                across = max(0.0, 1 - abs(x * width - column - 0.5))
                along = max(0.0, 1 - abs(y * height - row - 0.5))
                expected[row, column] += weight * across * along
    torch.testing.assert_close(splat(locations, weights, (height, width)), expected)


def test_splat_is_the_adjoint_of_sampling():
    """A cell gets as much attention as its value counts for in the attention's output."""
    shapes = [(5, 7), (3, 4)]
    locations, weights = _points(2 * 3 * 2 * 2, seed=1)
    locations, weights = locations.view(1, 2, 3, 2, 2, 2), weights.view(1, 2, 3, 2, 2)
    value = torch.zeros(1, 47, 3, 1, dtype=torch.float64, requires_grad=True)
    ms_deform_attn_reference(value, shapes, locations, weights).sum().backward()
    found = [
        splat(locations[0, :, :, level], weights[0, :, :, level], shape).flatten()
        for level, shape in enumerate(shapes)
    ]
    torch.testing.assert_close(torch.cat(found), value.grad.sum((0, 2, 3)))


def test_splat_loses_nothing_inside_and_all_outside():
    locations, weights = _points(low=0.2, high=0.8)
    torch.testing.assert_close(splat(locations, weights, (6, 6)).sum(), weights.sum())
    assert not splat(locations + 2, weights, (6, 6)).any()
    assert not splat(torch.full((3, 2), math.nan), torch.ones(3), (6, 6)).any()


def _detections(subject, sample):
    with torch.no_grad():
        return subject.model([sample.input])[0]["instances"].get_fields()


def test_capture_changes_no_output_and_leaves_no_hook():
    subject, (sample, _) = tiny_subject(0), tiny_samples()
    expected = _detections(subject, sample)
    decoder = subject.model.decoder
    with captured_attention(decoder) as captured:
        found = _detections(subject, sample)
    assert torch.equal(found["scores"], expected["scores"])
    assert torch.equal(found["pred_boxes"].tensor, expected["pred_boxes"].tensor)
    assert len(captured) == decoder.num_layers
    for layer in captured:
        torch.testing.assert_close(layer.weights.sum((-1, -2)), torch.ones(20, 4))
    assert not any(module._forward_pre_hooks for module in decoder.modules())
    with pytest.raises(RuntimeError, match="within"), captured_attention(decoder):
        raise RuntimeError("within")
    assert not any(module._forward_pre_hooks for module in decoder.modules())


def test_captured_points_are_those_of_the_output():
    """With one value per head that tells cells apart, the splatted attention gives the output."""
    subject, (sample, _) = tiny_subject(0), tiny_samples()
    model = subject.model.double()
    with torch.no_grad(), captured_attention(model.decoder) as captured:
        memory = model.encode(model.preprocess([sample.input]))
        seen = {}
        attention = model.decoder.layers[-1].cross_attention
        attention.value_proj.register_forward_hook(lambda *call: seen.update(value=call[2]))
        attention.output_proj.register_forward_hook(lambda *call: seen.update(sum=call[1][0]))
        model.decode(memory)
    layer = captured[-1]
    query = torch.zeros(layer.num_queries, dtype=torch.bool)
    query[3] = True
    heads = [
        torch.cat(
            [
                splat(
                    layer.locations[query, h, level], layer.weights[query, h, level], shape
                ).flatten()
                for level, shape in enumerate(memory.level_shapes)
            ]
        )
        for h in range(4)
    ]
    value = seen["value"][0].unflatten(-1, (4, -1))  # (S, H, D)
    expected = torch.einsum("hs,shd->hd", torch.stack(heads), value).flatten()
    torch.testing.assert_close(seen["sum"][0, 3], expected)
    torch.testing.assert_close(
        sum(level_map.sum() for level_map in layer.maps(query)), torch.stack(heads).sum()
    )


def test_matched_queries_are_one_per_object():
    subject, (sample, _) = tiny_subject(0), tiny_samples()
    with torch.no_grad():
        maps = attention_maps(subject.model, sample)
    assert all(
        level_map.shape == (96, 128) and level_map.isfinite().all() for level_map in maps.values()
    )
    # Two layers, of which the last is also there by level and in the mean.
    assert len(maps) == 2 * (2 * 5 + 1)
    assert not torch.equal(maps["all queries, last layer"], maps["matched queries, last layer"])


def test_an_unknown_attention_is_one_sentence():
    subject = tiny_subject(0)
    decoder = subject.model.decoder
    decoder.layers[1].cross_attention = nn.Identity()
    with pytest.raises(AnalysisError, match="attention of Identity cannot be read"):
        with captured_attention(decoder):
            pass
    assert not any(module._forward_pre_hooks for module in decoder.modules())


def test_section_leaves_out_what_does_not_apply():
    odd = tiny_subject(0, "odd")
    odd.model.decoder.layers[0].cross_attention = nn.Identity()
    subjects = [encoder_only_subject(), tiny_subject(2, seed=1), odd, tiny_subject(0)]
    samples = tiny_samples(((96, 128), (80, 112), (64, 64)), (3, 2, 0))
    section = measure_attention(subjects, samples, plain)
    assert "encoder only has no decoder" in section.text and "odd is left out" in section.text
    assert [[row[0] for row in table.rows] for table in section.tables] == [["K = 2", "K = 0"]] * 2
    assert section.tables[1].columns[:3] == ("model", "last layer", "last layer, level 1")
    assert section.numbers["K = 0"]["images"] == 2
    json.dumps(section.numbers, allow_nan=False)
    assert len(section.charts) == 4 and len(section.pictures) == 2

    none = measure_attention([encoder_only_subject()], samples, plain)
    assert none.text.startswith("No model has a decoder") and not none.charts
    empty = measure_attention([tiny_subject(0)], tiny_samples(num_gts=(0, 0)), plain)
    assert empty.text.startswith("No image has both") and not empty.charts
