"""Feeds the reference's random draws, proposals and samples to our heads.

Only what the reference drew at random, or what Detectron2's RPN and ROI heads decide differently
by design, is fed; each such entry is printed as ``given`` or ``known``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances
from torch import Tensor

from co_detr.modeling import CoDETR
from co_detr.parity.anchor_order import level_order
from co_detr.parity.case import Case


class RecordedPermutations:
    """Stands in for ``torch.randperm``, replaying what the reference drew in its order.

    Attributes:
        remaining: what our code did not ask for so far.
        num_shorter: how many draws were of fewer things than ours.
    """

    def __init__(self, recorded: list[Tensor]):
        self.remaining = list(recorded)
        self.num_shorter = 0

    def draw(self, number: int, lacks: frozenset[int] = frozenset()) -> Tensor:
        """The next permutation, which must be one of ``number`` things.

        Args:
            lacks: by how many it may be shorter.

        Raises:
            RuntimeError: if the reference drew something else, or nothing any more.
        """
        if not self.remaining:
            raise RuntimeError(f"Our code draws a permutation of {number} that was not recorded.")
        permutation = self.remaining.pop(0)
        self.num_shorter += len(permutation) < number
        if number - len(permutation) not in {0, *lacks}:
            raise RuntimeError(
                f"Our code draws a permutation of {number}, the reference of {len(permutation)}."
            )
        return permutation


def sampler_draws(case: Case, entries: dict) -> list[int]:
    """Lengths of the permutations that the reference's samplers drew: RPN first, then ROI.

    A sampler draws for an image's positives, then for its negatives, each only if it may not keep
    them all.
    """
    lengths = []
    for assigned, sampled in zip(entries["rpn"]["assign"], entries["rpn"]["sampled"], strict=True):
        found = assigned["gt_inds_all"]
        for available, kept in (
            ((found > 0).sum(), sampled["num_pos"]),
            ((found == 0).sum(), sampled["num_neg"]),
        ):
            lengths += [int(available)] if available > kept else []
    roi = zip(entries["roi"]["assign"], entries["roi"]["sampling"], strict=True)
    for gt_labels, (assigned, sampled) in zip(case.own["gt_labels"], roi, strict=True):
        found = assigned["gt_inds"]
        for available, kept in (
            ((found > 0).sum() + len(gt_labels), sampled["pos_inds"]),
            ((found == 0).sum(), sampled["neg_inds"]),
        ):
            lengths += [int(available)] if available > len(kept) else []
    return lengths


def missing_fillers(entries: dict) -> frozenset[int]:
    """By how many background samples the reference's pools are smaller than ours (``roi-trim``)."""
    counts = [len(each["pos_inds"]) + len(each["neg_inds"]) for each in entries["roi"]["sampling"]]
    return frozenset(count - min(counts) for count in counts)


@contextmanager
def recorded_draws(case: Case, model: CoDETR, entries: dict) -> Iterator[RecordedPermutations]:
    """Replays the recorded permutations for all sources of positive queries.

    Raises:
        RuntimeError: unless the record starts with what the samplers must have drawn.
    """
    recorded = entries["aux_randperms"]
    samplers = sampler_draws(case, entries)
    first = [len(permutation) for permutation in recorded[: len(samplers)]]
    if first != samplers:
        raise RuntimeError(f"Recorded draws of {first} where samplers must have drawn {samplers}.")
    replay = RecordedPermutations(recorded[len(samplers) :])
    sources = model.auxiliary.positive_queries
    for name, source in sources.items():
        lacks = missing_fillers(entries) if name == "roi" else frozenset()
        source.permutation = partial(replay.draw, lacks=lacks)
    try:
        yield replay
    finally:
        for source in sources.values():
            source.permutation = torch.randperm


@contextmanager
def reference_samples(case: Case, model: CoDETR, entries: dict) -> Iterator[None]:
    """Makes the model's heads use the RPN labels and ROI samples of the dump ``entries``."""
    roi = model.auxiliary.heads["roi"]
    rpn, roi_heads = roi.rpn, roi.roi_heads
    saved = rpn.batch_size_per_image
    rpn.label_and_sample_anchors = lambda anchors, gts: rpn_labels(case, rpn, entries["rpn"])
    # Difference by design ``rpn-normaliser``: what our loss divides by is set to the reference's.
    targets = entries["rpn"]["targets"]
    total = targets["num_total_pos"] + targets["num_total_neg"]
    rpn.batch_size_per_image = total / len(case.image_sizes)
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
    for image, size in enumerate(case.image_sizes):
        here = rois[:, 0] == image
        samples.append(
            Instances(
                size,
                proposal_boxes=Boxes(rois[here, 1:]),
                gt_classes=targets["labels"][here],
                gt_boxes=Boxes(targets["bbox_targets"][here]),
            )
        )
    return samples
