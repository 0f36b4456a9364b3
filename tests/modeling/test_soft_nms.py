"""Soft-NMS against a plain loop over one class at a time."""

import math

import pytest
import torch
from detectron2.structures import Boxes, Instances

from co_detr.errors import ConfigError
from co_detr.modeling import SoftNMSPostprocessor, TopKPostprocessor
from co_detr.modeling.postprocess import soft_nms
from tests.modeling.builders import geometry_of, random_boxes

SIZE = (96, 128)


def naive_iou(first, second):
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    inner = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return inner / max(sum(areas) - inner, 1e-6)


def naive_soft_nms(boxes, scores, classes, threshold, sigma=None):
    """Always takes the best box left, and lowers those of its class that are left then."""
    boxes, scores, classes = boxes.tolist(), scores.tolist(), classes.tolist()
    left = list(range(len(boxes)))
    while left:
        best = max(left, key=lambda index: scores[index])
        left.remove(best)
        for index in left:
            if classes[index] != classes[best]:
                continue
            overlap = naive_iou(boxes[best], boxes[index])
            if sigma is not None:
                scores[index] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                scores[index] *= 1 - overlap
    return torch.tensor(scores, dtype=torch.float64)


def crowd(number, num_classes, seed=0):
    """Boxes that overlap much, float64, with their scores and classes."""
    generator = torch.Generator().manual_seed(seed)
    centers = random_boxes(4, SIZE, generator, smallest=24.0).double()
    which = torch.randint(0, 4, (number,), generator=generator)
    boxes = centers[which] + 3 * torch.rand(number, 4, generator=generator).double()
    scores = torch.rand(number, generator=generator).double()
    return boxes, scores, torch.randint(0, num_classes, (number,), generator=generator)


@pytest.mark.parametrize("sigma", [None, 0.5])
@pytest.mark.parametrize("threshold", [0.3, 0.8])
@pytest.mark.parametrize(("number", "num_classes"), [(60, 7), (40, 1), (50, 40), (2, 1), (1, 1)])
def test_equals_the_plain_loop(number, num_classes, threshold, sigma):
    boxes, scores, classes = crowd(number, num_classes)
    found = soft_nms(boxes, scores, classes, threshold, sigma)
    expected = naive_soft_nms(boxes, scores, classes, threshold, sigma)
    torch.testing.assert_close(found, expected)
    if number > 2 and num_classes < 40:
        assert (found < scores).any()
    assert (found <= scores).all()


def test_class_numbers_need_not_follow_each_other():
    boxes, scores, classes = crowd(30, 3)
    sparse = torch.tensor([79, 2, 1000])[classes]
    assert torch.equal(soft_nms(boxes, scores, sparse, 0.5), soft_nms(boxes, scores, classes, 0.5))


def test_ties_are_visited_one_after_the_other():
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]], dtype=torch.float64)
    boxes = torch.cat([box, box + torch.tensor([0, 0, 0, 1.0]), box + torch.tensor([0, 0, 0, 2.0])])
    scores = torch.full((3,), 0.5, dtype=torch.float64)
    classes = torch.zeros(3, dtype=torch.long)
    found = soft_nms(boxes, scores, classes, 0.5)
    torch.testing.assert_close(found, naive_soft_nms(boxes, scores, classes, 0.5))
    assert found[0] == 0.5 and (found[1:] < 0.1).all()


def test_exactly_the_same_box_loses_all_of_its_score():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).expand(3, 4)
    found = soft_nms(boxes, torch.tensor([0.5, 0.9, 0.7]), torch.tensor([0, 0, 1]), 0.8)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.9, 0.7]))


def test_empty():
    none = torch.zeros(0)
    assert soft_nms(torch.zeros(0, 4), none, none.long(), 0.8).shape == (0,)
    empty = Instances(SIZE, pred_boxes=Boxes(torch.zeros(0, 4)), scores=none, pred_classes=none)
    assert len(SoftNMSPostprocessor().thin_out(empty)) == 0


def outputs(seed=0, queries=30, num_classes=4):
    """Logits and boxes of two images, many of the latter nearly alike."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, queries, num_classes, generator=generator)
    boxes = torch.tensor([0.5, 0.5, 0.4, 0.4]) + 0.02 * torch.rand(
        2, queries, 4, generator=generator
    )
    return logits, boxes, geometry_of([SIZE, (80, 112)])


def test_detections_are_those_of_the_loop():
    logits, boxes, geometry = outputs()
    found = SoftNMSPostprocessor(max_detections=12, iou_threshold=0.6)(logits, boxes, geometry)
    candidates = TopKPostprocessor(logits.shape[1])(logits, boxes, geometry)
    for after, before in zip(found, candidates, strict=True):
        scores = naive_soft_nms(before.pred_boxes.tensor, before.scores, before.pred_classes, 0.6)
        best = scores.argsort(descending=True, stable=True)
        best = best[scores[best] >= 1e-3][:12]
        assert 0 < len(after) == len(best) <= 12
        torch.testing.assert_close(after.scores, scores[best].float())
        assert torch.equal(after.pred_classes, before.pred_classes[best])
        assert torch.equal(after.pred_boxes.tensor, before.pred_boxes.tensor[best])
        assert (after.scores[:-1] >= after.scores[1:]).all()


def test_low_scores_are_dropped_but_never_the_best():
    logits, boxes, geometry = outputs()
    for found in SoftNMSPostprocessor(min_score=0.3)(logits, boxes, geometry):
        assert len(found) < 30 and found.scores.min() >= 0.3
    kept = SoftNMSPostprocessor(min_score=0.3)(logits - 20.0, boxes, geometry)
    candidates = TopKPostprocessor(1)(logits - 20.0, boxes, geometry)
    for instances, best in zip(kept, candidates, strict=True):
        assert instances.scores.tolist() == best.scores.tolist()


def test_starts_from_as_many_pairs_as_queries():
    logits, boxes, geometry = outputs()
    spread = boxes * torch.linspace(0.1, 1.0, 30)[:, None]  # nothing overlaps enough
    postprocessor = SoftNMSPostprocessor(max_detections=500, iou_threshold=0.99)
    assert [len(instances) for instances in postprocessor(logits, spread, geometry)] == [30, 30]


@pytest.mark.parametrize(
    "settings",
    [{"max_detections": 0}, {"iou_threshold": 2}, {"min_score": -0.1}, {"sigma": 0}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_out_of_range(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ConfigError, match=f"postprocessor.{name}={value} must be"):
        SoftNMSPostprocessor(**settings)
    if name == "max_detections":
        with pytest.raises(ConfigError, match="postprocessor.max_detections=0 must be"):
            TopKPostprocessor(**settings)
