"""Center sampling against a loop written from section 3 of FCOS."""

import math

import pytest
import torch

from co_detr.modeling.auxiliary import CenterSamplingAssigner
from tests.modeling.dense_cases import grid_anchors, make_gts

STRIDES = (8, 16, 32)
# Points as squares of the side of the stride, in the middle of their cells.
LEVELS = [
    level + stride / 2
    for level, stride in zip(grid_anchors(scale=1.0, strides=STRIDES), STRIDES, strict=True)
]
RANGES = [(0, 32), (32, 64), (64, math.inf)]  # of the longest distance, in pixels


def naive_assign(gt_boxes, radius):
    assigned = []
    for level, stride, (low, high) in zip(LEVELS, STRIDES, RANGES, strict=True):
        for x1, y1, x2, y2 in level.tolist():
            x, y = (x1 + x2) / 2, (y1 + y2) / 2
            smallest, found = math.inf, -1
            for index, (left, top, right, bottom) in enumerate(gt_boxes.tolist()):
                distances = (x - left, y - top, right - x, bottom - y)
                center_x, center_y = (left + right) / 2, (top + bottom) / 2
                in_box = min(distances) > 0
                in_center = max(abs(x - center_x), abs(y - center_y)) < radius * stride
                in_range = low <= max(distances) <= high
                area = (right - left) * (bottom - top)
                if in_box and in_center and in_range and area < smallest:
                    smallest, found = area, index
            assigned.append(found)
    return torch.tensor(assigned)


@pytest.mark.parametrize("kind", ["random", "none", "tiny", "overlapping", "duplicates", "outside"])
@pytest.mark.parametrize("radius", [1.5, 0.75])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_loop(kind, radius, seed):
    gt_boxes = make_gts(kind, seed)
    assigned = CenterSamplingAssigner(radius, reach=4.0)(LEVELS, gt_boxes)
    assert torch.equal(assigned, naive_assign(gt_boxes, radius))
    if kind != "tiny":  # which may lie between the points
        assert (assigned >= 0).any() == (kind != "none")
    if kind == "duplicates":
        assert (assigned < 4).all()  # of equals, the first
    if kind == "outside":
        assert (assigned < 4).all()


def test_each_size_has_its_level():
    boxes = {0: (60, 60, 76, 76), 1: (20, 20, 100, 100), 2: (0, 0, 160, 128)}
    for expected, box in boxes.items():
        assigned = CenterSamplingAssigner(reach=4.0)(LEVELS, torch.tensor([box]).float())
        found = [(part >= 0).any() for part in assigned.split([len(level) for level in LEVELS])]
        assert [i for i, any_point in enumerate(found) if any_point] == [expected]


def test_the_default_ranges_are_those_of_the_paper():
    """Distances of 64, 128, 256 and 512 pixels part the levels of strides 8 to 128."""
    strides = (8, 16, 32, 64, 128)
    points = [torch.tensor([[-s / 2, -s / 2, s / 2, s / 2]]) for s in strides]
    for distance, expected in ((63, 0), (65, 1), (127, 1), (129, 2), (257, 3), (511, 3), (513, 4)):
        # Around the origin, but for one side by a hair: centers are near enough on all levels.
        box = torch.tensor([[-distance, -distance, distance, distance]]).float()
        assigned = CenterSamplingAssigner()(points, box)
        assert (assigned >= 0).nonzero().flatten().tolist() == [expected]


@pytest.mark.parametrize("max_pairs", [1, 500, 5000])
def test_a_crowd_is_assigned_in_parts(max_pairs):
    gt_boxes = torch.cat([make_gts("random", seed) for seed in range(5)])
    expected = CenterSamplingAssigner(reach=4.0)(LEVELS, gt_boxes)
    parts = CenterSamplingAssigner(reach=4.0, max_pairs=max_pairs)(LEVELS, gt_boxes)
    assert torch.equal(parts, expected) and (expected >= 0).any()


def test_no_points():
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]])
    assert CenterSamplingAssigner()([torch.zeros(0, 4)], boxes).shape == (0,)
