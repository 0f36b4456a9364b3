"""Anchors, ground truths and plain arithmetic for the tests of assigners and dense heads."""

import math

import torch

from tests.modeling.builders import make_instances, random_boxes

IMAGE = (128, 160)
SIZES = [(96, 128), (64, 80)]  # the second one is padded
BOXES = torch.tensor([[10.0, 13.0, 47.0, 58.0], [60.0, 20.0, 118.0, 90.0]])
GTS = [
    make_instances(BOXES, torch.tensor([2, 0]), SIZES[0]),
    make_instances(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), SIZES[1]),
]


def grid_anchors(scale=4.0, strides=(8, 16, 32), image=IMAGE):
    """One square anchor of side `scale * stride` per cell."""
    levels = []
    for stride in strides:
        centers = [
            (column * stride, row * stride)
            for row in range(math.ceil(image[0] / stride))
            for column in range(math.ceil(image[1] / stride))
        ]
        half = scale * stride / 2
        levels.append(torch.tensor([[x - half, y - half, x + half, y + half] for x, y in centers]))
    return levels


def iou(first, second):
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return overlap / (sum(areas) - overlap)


def center(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def make_gts(kind, seed):
    """Ground truths ``(G, 4)``: random, none, tiny, overlapping, duplicates or outside."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "none":
        return torch.zeros(0, 4)
    if kind == "tiny":
        low = torch.rand(6, 2, generator=generator) * 100
        return torch.cat([low, low + 0.5 + torch.rand(6, 2, generator=generator) * 3], 1)
    boxes = random_boxes(8, IMAGE, generator)
    if kind == "overlapping":  # all within a few pixels of each other
        boxes = boxes[:1] + torch.rand(8, 4, generator=generator) * 6
    if kind == "duplicates":
        boxes = boxes[:4].repeat(2, 1)
    if kind == "outside":  # half of them across a border, half of them nowhere near
        boxes[:4] -= boxes[:4, :2].repeat(1, 2) + 10
        boxes[4:] += 1000
    return boxes


def make_maps(head, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 32, -(-96 // stride), -(-128 // stride)) for stride in head.strides]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def run_dense_head(head, gts=GTS):
    """Anchors ``(R, 4)``, predictions and final targets."""
    maps = make_maps(head)
    anchors = head.anchors(maps)
    with torch.no_grad():
        predictions = head.predict(maps)
    targets = head.assign(anchors, maps, SIZES, gts)
    return torch.cat(anchors), predictions, head.refine(targets, predictions, anchors)
