"""Feeds the reference's random draws, proposals and samples to our heads.

Only what the reference drew at random, or what Detectron2's RPN and ROI heads decide differently
by design, is fed; each such entry is printed as ``given`` or ``known``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances
from torch import Tensor

from co_detr.modeling import CoDETR
from co_detr.parity.case import Case

RATIOS = 3


def anchor_order(num_cells: int, num_anchors: int) -> Tensor:
    """Index that turns the reference's rows (ratio outside) into Detectron2's (size outside).

    ``detectron2_rows = reference_rows[anchor_order(...)]`` for ``num_cells * num_anchors`` rows.
    """
    within = torch.arange(num_anchors).view(RATIOS, -1).t().flatten()
    return (torch.arange(num_cells)[:, None] * num_anchors + within).flatten()


def level_order(counts: list[int], num_anchors: int) -> Tensor:
    """``anchor_order`` over several levels; ``counts`` are anchors per level."""
    orders, start = [], 0
    for count in counts:
        orders.append(anchor_order(count // num_anchors, num_anchors) + start)
        start += count
    return torch.cat(orders)


class RecordedPermutations:
    """Stands in for ``torch.randperm``, replaying what the reference drew."""

    def __init__(self, recorded: list[Tensor]):
        self.remaining = list(recorded)

    def __call__(self, number: int) -> Tensor:
        if not self.remaining:
            raise RuntimeError(f"Our code draws a permutation of {number} that was not recorded.")
        return self.remaining.pop(0)


class _CountingPermutations:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, number: int) -> Tensor:
        self.calls += 1
        return torch.arange(number)


@contextmanager
def reference_samples(case: Case, model: CoDETR, entries: dict) -> Iterator[None]:
    """Makes the model's heads use the RPN labels and ROI samples of the dump ``entries``."""
    roi = model.auxiliary.heads["roi"]
    rpn, roi_heads = roi.rpn, roi.roi_heads
    saved = rpn.batch_size_per_image
    rpn.label_and_sample_anchors = lambda anchors, gts: rpn_labels(case, rpn, entries["rpn"])
    # Detectron2 divides by batch_size_per_image x images, mmdet by what was sampled.
    targets = entries["rpn"]["targets"]
    total = targets["num_total_pos"] + targets["num_total_neg"]
    rpn.batch_size_per_image = total / len(case.own["image_sizes_hw"])
    roi_heads.label_and_sample_proposals = lambda proposals, gts: roi_samples(case, entries["roi"])
    try:
        yield
    finally:
        del rpn.label_and_sample_anchors, roi_heads.label_and_sample_proposals
        rpn.batch_size_per_image = saved


def rpn_labels(case: Case, rpn: RPN, entries: dict) -> tuple[list[Tensor], list[Tensor]]:
    """The reference's anchor labels and matched boxes, in Detectron2's order and meaning."""
    targets = entries["targets"]
    order = level_order(
        [labels.shape[1] for labels in targets["labels"]], rpn.anchor_generator.num_anchors[0]
    )
    labels, boxes = [], []
    for image, gt_boxes in enumerate(case.own["gt_boxes_xyxy"]):
        background = torch.cat([level[image] for level in targets["labels"]])  # 0 means object
        used = torch.cat([level[image] for level in targets["label_weights"]]) > 0
        label = torch.where(used, 1 - background, -1)[order]
        labels.append(label.to(torch.int8))
        found = entries["assign"][image]["gt_inds_all"][order]
        padded = torch.cat([gt_boxes, gt_boxes.new_zeros(1, 4)])
        boxes.append(padded[torch.where(found > 0, found - 1, len(gt_boxes))])
    return labels, boxes


def roi_samples(case: Case, entries: dict) -> list[Instances]:
    """The reference's sampled proposals with their targets."""
    rois, targets = entries["rois"], entries["targets"]
    samples = []
    for image, size in enumerate(case.own["image_sizes_hw"]):
        here = rois[:, 0] == image
        samples.append(
            Instances(
                tuple(size),
                proposal_boxes=Boxes(rois[here, 1:]),
                gt_classes=targets["labels"][here],
                gt_boxes=Boxes(targets["bbox_targets"][here]),
            )
        )
    return samples


@contextmanager
def recorded_draws(model: CoDETR, recorded: list[Tensor], dry_run) -> Iterator[None]:
    """Replays the recorded permutations for all sources of positive queries.

    The record also holds the samplers' draws, which come first. ``dry_run`` is called once to
    count how many of the last ones belong to the positive queries.
    """
    sources = list(model.auxiliary.positive_queries.values())
    counter = _CountingPermutations()
    for source in sources:
        source.permutation = counter
    dry_run()
    replay = RecordedPermutations(recorded[len(recorded) - counter.calls :])
    for source in sources:
        source.permutation = replay
    try:
        yield
    finally:
        for source in sources:
            source.permutation = torch.randperm
    if replay.remaining:
        raise RuntimeError(f"{len(replay.remaining)} recorded permutations were not used.")
