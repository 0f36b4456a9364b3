"""Assignment by overlap against a loop written from RetinaNet and Faster R-CNN."""

import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou

from co_detr.modeling.auxiliary import MaxIoUAssigner
from tests.modeling.dense_cases import grid_anchors, iou, make_gts

LEVELS = grid_anchors(scale=2.0)


def naive_assign(levels, gt_boxes, low, high):
    """Assignment of every anchor, and the anchors whose decision hangs on rounding."""
    anchors = [anchor for level in levels for anchor in level.tolist()]
    truths = gt_boxes.tolist()
    overlaps = [[iou(anchor, gt) for gt in truths] for anchor in anchors]
    assigned, uncertain = [], set()
    for i, row in enumerate(overlaps):
        best = max(row, default=0.0)
        if best >= high:
            assigned.append(row.index(best))
        else:
            assigned.append(-1 if best < low else -2)
        if min(abs(best - low), abs(best - high)) < 1e-6:
            uncertain.add(i)
        if sorted(row)[-2:-1] and 0 < best - sorted(row)[-2] < 1e-6:
            uncertain.add(i)
    for g in range(len(truths)):
        column = [row[g] for row in overlaps]
        best = max(column)
        for i, overlap in enumerate(column):
            if 0 < best - overlap < 1e-6:
                uncertain.add(i)
            if overlap == best and best > 0:
                assigned[i] = overlaps[i].index(max(overlaps[i]))
    return torch.tensor(assigned), uncertain


@pytest.mark.parametrize("kind", ["random", "none", "tiny", "overlapping", "duplicates", "outside"])
@pytest.mark.parametrize("thresholds", [(0.4, 0.5), (0.1, 0.1)])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_loop(kind, thresholds, seed):
    gt_boxes = make_gts(kind, seed)
    assigned = MaxIoUAssigner(*thresholds)(LEVELS, gt_boxes)
    expected, uncertain = naive_assign(LEVELS, gt_boxes, *thresholds)
    certain = torch.tensor([i not in uncertain for i in range(len(expected))])
    assert certain.float().mean() > 0.98
    assert torch.equal(assigned[certain], expected[certain])
    assert (assigned >= 0).any() == (kind != "none")
    if kind == "duplicates":
        assert (assigned < 4).all()  # of equals, the first
    if kind == "outside":
        assert (assigned < 4).all()  # the last four overlap no anchor


def test_neither_foreground_nor_background():
    assigned = MaxIoUAssigner(0.4, 0.5)(LEVELS, make_gts("random", 0))
    assert {-1, -2} <= set(assigned.tolist())
    assigned = MaxIoUAssigner(0.1, 0.1)(LEVELS, make_gts("random", 0))
    assert -2 not in assigned


def test_is_detectron2s_matcher():
    gt_boxes = make_gts("random", 4)
    matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    matches, labels = matcher(pairwise_iou(Boxes(gt_boxes), Boxes(torch.cat(LEVELS))))
    expected = torch.where(labels == 1, matches, torch.where(labels == 0, -1, -2))
    assert torch.equal(MaxIoUAssigner()(LEVELS, gt_boxes), expected)


@pytest.mark.parametrize("max_pairs", [1, 500, 5000])
def test_a_crowd_is_assigned_in_parts(max_pairs):
    gt_boxes = torch.cat([make_gts("random", seed) for seed in range(5)])
    expected = MaxIoUAssigner()(LEVELS, gt_boxes)
    assert torch.equal(MaxIoUAssigner(max_pairs=max_pairs)(LEVELS, gt_boxes), expected)


def test_no_anchors():
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]])
    assert MaxIoUAssigner()([torch.zeros(0, 4)], boxes).shape == (0,)
