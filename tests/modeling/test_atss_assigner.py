"""ATSS assignment against a loop written from algorithm 1 of the paper."""

import math

import pytest
import torch

from co_detr.modeling.auxiliary import ATSSAssigner
from tests.modeling.dense_cases import center, grid_anchors, iou, make_gts


def naive_assign(levels, gt_boxes, topk):
    """Assignment of every anchor, and the anchors whose decision hangs on rounding."""
    anchors = [anchor for level in levels for anchor in level.tolist()]
    best_overlap = [-1.0] * len(anchors)
    assigned, uncertain = [-1] * len(anchors), set()
    for index, gt in enumerate(gt_boxes.tolist()):
        candidates, start = [], 0
        for level in levels:
            distances = [
                (math.dist(center(anchor), center(gt)), start + i)
                for i, anchor in enumerate(level.tolist())
            ]
            candidates += [i for _, i in sorted(distances)[:topk]]
            start += len(level)
        overlaps = [iou(anchors[i], gt) for i in candidates]
        mean = sum(overlaps) / len(overlaps)
        variance = sum((value - mean) ** 2 for value in overlaps) / (len(overlaps) - 1)
        threshold = mean + math.sqrt(variance)
        for i, overlap in zip(candidates, overlaps, strict=True):
            x, y = center(anchors[i])
            inside = min(x - gt[0], y - gt[1], gt[2] - x, gt[3] - y) > 0.01
            if inside and abs(overlap - threshold) < 1e-6:
                uncertain.add(i)
            if inside and overlap >= threshold and overlap > best_overlap[i]:
                best_overlap[i], assigned[i] = overlap, index
    return torch.tensor(assigned), uncertain


@pytest.mark.parametrize("kind", ["random", "none", "tiny", "overlapping", "duplicates", "outside"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_loop(kind, seed):
    levels = grid_anchors()
    gt_boxes = make_gts(kind, seed)
    # Nearest anchors are unique unless a center lies exactly between cells, which these do not.
    assigned = ATSSAssigner(topk=9)(levels, gt_boxes)
    expected, uncertain = naive_assign(levels, gt_boxes, topk=9)
    certain = torch.tensor([i not in uncertain for i in range(len(expected))])
    assert certain.float().mean() > 0.99
    assert torch.equal(assigned[certain], expected[certain])
    positives = (assigned >= 0).sum()
    if kind == "none":
        assert positives == 0
    elif kind != "tiny":
        assert positives >= 4
    if kind == "duplicates":
        assert (assigned < 4).all()  # of equals, the first


@pytest.mark.parametrize(("shift", "is_inside"), [(0.0, False), (0.005, False), (0.02, True)])
def test_a_center_on_the_border_is_not_inside(shift, is_inside):
    gt_boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    far = torch.tensor([[100.0, 100.0, 110.0, 110.0], [200.0, 100.0, 210.0, 110.0]])
    anchor = torch.tensor([[-5.0 + shift, 0.0, 5.0 + shift, 10.0]])  # overlaps enough in any case
    assigned = ATSSAssigner(topk=3)([torch.cat([anchor, far])], gt_boxes)
    assert assigned.tolist() == [0 if is_inside else -1, -1, -1]


def test_levels_smaller_than_topk():
    levels = grid_anchors(strides=(16, 64, 128))  # 80, 6 and 2 anchors
    assert [len(level) for level in levels] == [80, 6, 2]
    gt_boxes = make_gts("random", 5)
    expected, uncertain = naive_assign(levels, gt_boxes, topk=9)
    assert not uncertain
    assert torch.equal(ATSSAssigner(topk=9)(levels, gt_boxes), expected)


def test_order_of_the_ground_truth_does_not_matter():
    levels, gt_boxes = grid_anchors(), make_gts("random", 1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assigned = ATSSAssigner()(levels, gt_boxes)
    shuffled = ATSSAssigner()(levels, gt_boxes[order])
    back = torch.where(shuffled >= 0, order[shuffled.clamp(min=0)], -1)
    assert torch.equal(back, assigned)


@pytest.mark.parametrize("max_pairs", [1, 500, 1000])
def test_a_crowd_is_assigned_in_parts(max_pairs):
    levels = grid_anchors()  # 320, 80 and 20 anchors
    gt_boxes = torch.cat([make_gts("random", seed) for seed in range(5)])
    expected = ATSSAssigner()(levels, gt_boxes)
    assert torch.equal(ATSSAssigner(max_pairs=max_pairs)(levels, gt_boxes), expected)


def test_a_box_between_anchors_gets_nothing_but_does_not_fail():
    levels = grid_anchors()
    assigned = ATSSAssigner()(levels, torch.tensor([[3.0, 3.0, 4.0, 4.0]]))
    assert (assigned == -1).all()


def test_no_anchors():
    assert ATSSAssigner()([torch.zeros(0, 4)], torch.tensor([[0.0, 0.0, 9.0, 9.0]])).shape == (0,)
