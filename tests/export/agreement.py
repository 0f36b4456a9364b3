"""Detections as equal as two ways of computing them can be."""

from detectron2.structures import Instances

from co_detr.tools.export.graph import Detections
from co_detr.tools.export.predictor import Difference, difference


def of(found: Instances) -> Detections:
    fields = [found.pred_boxes.tensor, found.scores, found.pred_classes]
    if found.has("mask_scores"):
        fields += [found.pred_masks.probabilities, found.mask_scores / found.scores]
    return Detections(*(field[None] for field in fields))


def assert_same(found: Instances, expected: Instances, at_least: int = 50) -> Difference:
    """Same image, and detections that agree much closer than `--check` asks for."""
    assert found.image_size == expected.image_size
    result = difference(of(expected), of(found))
    assert result.is_small and result.compared >= at_least, result
    assert result.score < 1e-5 and result.box < 0.01 and result.mask < 1e-3, result
    return result
