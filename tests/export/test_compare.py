"""How lists of detections are compared."""

import dataclasses

import pytest
import torch

from co_detr.errors import ExportError
from co_detr.tools.export.graph import Description, Detections, SoftNMS
from co_detr.tools.export.predictor import difference


@pytest.fixture
def detections() -> Detections:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(1, 30, 2, generator=generator) * 500
    scores = torch.linspace(0.9, 0.1, 30)[None]
    labels = torch.arange(30)[None] % 3
    masks = torch.rand(1, 30, 8, 8, generator=generator)
    return Detections(torch.cat([low, low + 50], dim=-1), scores, labels, masks, scores / 2)


def changed(detections: Detections, index: int, **values) -> Detections:
    fields = {key: value.clone() for key, value in vars(detections).items()}
    for key, value in values.items():
        fields[key][0, index] = torch.as_tensor(value, dtype=fields[key].dtype)
    return Detections(**fields)


def test_order_means_nothing(detections):
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    shuffled = Detections(*(value[:, order] for value in vars(detections).values()))
    result = difference(detections, shuffled)
    assert result.is_small and result.compared == 30
    assert result.score == result.box == result.lost == result.at_cut == 0


def test_largest_differences_are_found(detections):
    score = detections.scores[0, 4].item()
    found = changed(detections, 4, scores=score + 5e-4)
    found = changed(found, 7, boxes=detections.boxes[0, 7] + torch.tensor([0.0, 0.0, 0.4, 0.0]))
    result = difference(detections, found)
    assert result.is_small
    assert result.score == pytest.approx(5e-4, rel=1e-3)
    assert result.box == pytest.approx(0.4, rel=1e-3)


@pytest.mark.parametrize(
    "values",
    [
        {"scores": 0.7},
        {"boxes": [0.0, 0.0, 900.0, 900.0]},
        {"boxes": [float("nan")] * 4},
        {"scores": float("nan")},
        {"labels": 9},
        {"masks": 0.0},
        {"mask_ious": 0.99},
    ],
)
def test_a_wrong_detection_is_seen(detections, values):
    assert not difference(detections, changed(detections, 5, **values)).is_small


def test_the_last_ones_may_differ(detections):
    found = changed(detections, 29, labels=9)
    result = difference(detections, found)
    assert result.is_small and (result.compared, result.at_cut, result.lost) == (29, 2, 0)


def test_equal_scores_prove_nothing(detections):
    flat = dataclasses.replace(detections, scores=torch.full((1, 30), 0.01))
    other = dataclasses.replace(flat, boxes=flat.boxes + 300)
    assert difference(flat, flat).is_small
    assert not difference(flat, other).is_small


def test_descriptions_survive_as_text():
    soft_nms = SoftNMS(100, 0.8, 1e-3, None)
    description = Description(
        "a.py", ["ä", "b c"], 800, 1333, (64, 96), soft_nms=soft_nms, value_range=(0, 4095)
    )
    text = description.to_text()
    assert all(isinstance(value, str) for value in text.values())
    assert Description.from_text(text | {"other": "key"}, "a.onnx") == description
    del text["value_range"]  # as in files of an earlier version
    assert Description.from_text(text, "a.onnx").value_range is None
    with pytest.raises(ExportError, match="a.onnx does not describe itself"):
        Description.from_text({"format_version": "1"}, "a.onnx")
    with pytest.raises(ExportError, match="a.onnx has format version 2"):
        Description.from_text(text | {"format_version": "2"}, "a.onnx")


def test_very_thin_images_keep_a_pixel():
    assert Description("a.py", [], 800, 1333).resized(1, 60000) == (1, 1333)
    assert Description("a.py", [], 800, 1333, (64, 96)).resized(60000, 1) == (64, 1)
