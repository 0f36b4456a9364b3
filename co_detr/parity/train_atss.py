"""Compares the ATSS head of a training step."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from co_detr.modeling.auxiliary import ATSSHead
from co_detr.modeling.auxiliary.dense import DenseTargets, centreness_target
from co_detr.parity import tolerances as tol
from co_detr.parity.report import Report
from co_detr.parity.train_run import TrainingRun

UNASSIGNED = -1e8  # the reference's overlap of an anchor without a ground truth


@torch.no_grad()
def check_atss(report: Report, prefix: str, run: TrainingRun) -> None:
    """All entries below ``<prefix>.atss``."""
    name, head = f"{prefix}.atss", run.model.auxiliary.heads["atss"]
    maps = [run.pyramid[feature] for feature in head.in_features]
    anchors = head.anchors(maps)
    counts = [len(level) for level in anchors]
    _check_maps(report, name, head, maps, counts)
    report.close(f"{name}.anchors", anchors, tol.GEOMETRY_PIXELS)

    truth = run.case.ground_truth()
    targets = head.assign(anchors, maps, run.images.image_sizes, truth)
    flags = [list(inside.split(counts)) for inside in targets.inside]
    report.exact(f"{name}.valid_flags", flags)
    for image, instances in enumerate(truth):
        key = f"{name}.assign[{image}]"
        _check_assignment(report, key, head, anchors, targets.inside[image], instances)

    name = f"{name}.targets"
    positive = targets.labels < head.num_classes
    report.exact(f"{name}.labels", list(targets.labels.split(counts, 1)))
    report.exact(f"{name}.label_weights", list(targets.inside.float().split(counts, 1)))
    report.close(f"{name}.bbox_targets", list(targets.boxes.split(counts, 1)), tol.GEOMETRY_PIXELS)
    negatives = (targets.inside & ~positive).sum(1)
    report.exact(f"{name}.num_total_pos", int(positive.sum(1).clamp(min=1).sum()))
    report.exact(f"{name}.num_total_neg", int(negatives.clamp(min=1).sum()))

    # What the training step itself passed on to the positive queries.
    candidates = run.output.auxiliary["atss"].candidates.instances
    boxes = [each.proposal_boxes.tensor for each in candidates]
    report.close(f"{name}.anchors_unmapped", boxes, tol.GEOMETRY_PIXELS)
    report.exact(f"{name}.labels_per_image", [each.gt_classes for each in candidates])
    boxes = [each.gt_boxes.tensor for each in candidates]
    report.close(f"{name}.bbox_targets_per_image", boxes, tol.GEOMETRY_PIXELS)
    _check_centreness(report, f"{prefix}.atss", torch.cat(anchors), targets, positive, counts)


def _check_maps(
    report: Report, name: str, head: ATSSHead, maps: list[Tensor], counts: list[int]
) -> None:
    predictions = head.predict(maps)
    for entry, rows in (
        ("cls_logits", predictions.logits),
        ("bbox_deltas", predictions.deltas),
        ("centerness", predictions.quality[..., None]),
    ):
        folded = [
            level.transpose(1, 2).unflatten(2, features.shape[-2:])
            for level, features in zip(rows.split(counts, dim=1), maps, strict=True)
        ]
        report.close(f"{name}.{entry}", folded, tol.LOGIT)


def _check_assignment(
    report: Report,
    name: str,
    head: ATSSHead,
    anchors: list[Tensor],
    inside: Tensor,
    truth: Instances,
) -> None:
    """Ground-truth numbers and overlaps, which the head does not keep: its assigner is asked."""
    counts = [len(level) for level in anchors]
    kept = [level[keep] for level, keep in zip(anchors, inside.split(counts), strict=True)]
    assigned = torch.full((len(inside),), -2)
    assigned[inside] = head.assigner(kept, truth.gt_boxes.tensor)
    report.exact(f"{name}.gt_inds_all", assigned + 1)
    # The reference's marks: 0 everywhere inside an image without ground truth.
    ours = torch.full((len(inside),), UNASSIGNED)
    if not len(truth):
        ours[inside] = 0.0
    found = assigned >= 0
    overlaps = pairwise_iou(Boxes(torch.cat(anchors)[found]), truth.gt_boxes)
    ours[found] = overlaps.gather(1, assigned[found, None]).squeeze(1)
    report.close(f"{name}.max_overlaps_all", ours, tol.GEOMETRY)


def _check_centreness(
    report: Report,
    name: str,
    anchors: Tensor,
    targets: DenseTargets,
    positive: Tensor,
    counts: list[int],
) -> None:
    """Inputs and targets, per level with positives, positives of all images in order."""
    inputs, outputs = [], []
    levels = zip(
        anchors.split(counts),
        targets.boxes.split(counts, 1),
        positive.split(counts, 1),
        strict=True,
    )
    for level_anchors, boxes, mask in levels:
        if not mask.any():
            continue
        chosen = level_anchors.expand(len(mask), -1, -1)[mask], boxes[mask]
        inputs.append(chosen)
        outputs.append(centreness_target(*chosen))
    report.close(f"{name}.centerness_inputs", inputs, tol.GEOMETRY_PIXELS)
    report.close(f"{name}.centerness_targets", outputs, tol.GEOMETRY)
