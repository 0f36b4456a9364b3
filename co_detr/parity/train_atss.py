"""Compares the ATSS head of a training step."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, pairwise_iou

from co_detr.modeling.auxiliary.atss import centreness_target
from co_detr.parity import tolerances as tol
from co_detr.parity.report import Report
from co_detr.parity.train_run import TrainingRun


@torch.no_grad()
def check_atss(report: Report, prefix: str, run: TrainingRun) -> None:
    """All entries below ``<prefix>.atss``."""
    name, head = f"{prefix}.atss", run.model.auxiliary.heads["atss"]
    maps = [run.pyramid[feature] for feature in head.in_features]
    anchors = head.anchors(maps)
    counts = [len(level) for level in anchors]
    if report.has(f"{name}.cls_logits"):
        predictions = head.predict(maps)
        shapes = [m.shape[-2:] for m in maps]
        for entry, rows, tolerance in (
            ("cls_logits", predictions.logits, tol.LOGIT),
            ("bbox_deltas", predictions.deltas, tol.LOGIT),
            ("centerness", predictions.centreness[..., None], tol.LOGIT),
        ):
            levels = rows.split(counts, dim=1)
            folded = [
                level.transpose(1, 2).unflatten(2, shape)
                for level, shape in zip(levels, shapes, strict=True)
            ]
            report.close(f"{name}.{entry}", folded, tolerance)
        report.close(f"{name}.anchors", anchors, tol.GEOMETRY)

    truth = run.case.ground_truth(torch.float32)
    targets = head.assign(anchors, maps, run.images.image_sizes, truth)
    if report.has(f"{name}.valid_flags"):
        flags = [list(inside.split(counts)) for inside in targets.inside]
        report.exact(f"{name}.valid_flags", flags)
    flat = torch.cat(anchors)
    for image, instances in enumerate(truth):
        _check_assignment(report, name, run, flat, targets, image, instances)

    by_level = {
        "labels": targets.labels.split(counts, dim=1),
        "label_weights": targets.inside.float().split(counts, dim=1),
        "bbox_targets": targets.boxes.split(counts, dim=1),
    }
    for entry, levels in by_level.items():
        if report.has(f"{name}.targets.{entry}"):
            report.close(f"{name}.targets.{entry}", list(levels), tol.GEOMETRY)
    positive = targets.labels < run.case.num_classes
    negatives = (targets.inside & ~positive).sum(1)
    report.exact(f"{name}.targets.num_total_pos", int(positive.sum(1).clamp(min=1).sum()))
    report.exact(f"{name}.targets.num_total_neg", int(negatives.clamp(min=1).sum()))

    candidates = run.output.auxiliary["atss"].candidates.instances
    unmapped = [each.proposal_boxes.tensor for each in candidates]
    report.close(f"{name}.targets.anchors_unmapped", unmapped, tol.GEOMETRY)
    report.exact(f"{name}.targets.labels_per_image", [each.gt_classes for each in candidates])
    boxes = [each.gt_boxes.tensor for each in candidates]
    report.close(f"{name}.targets.bbox_targets_per_image", boxes, tol.GEOMETRY)
    _check_centreness(report, name, flat, targets, positive, counts)


def _check_assignment(report, name, run, anchors, targets, image, instances) -> None:
    """Ground-truth indices follow from boxes and labels; ours are asked from the assigner."""
    head = run.model.auxiliary.heads["atss"]
    inside = targets.inside[image]
    levels = [len(level) for level in head.anchors([run.pyramid[f] for f in head.in_features])]
    kept = [
        level[keep] for level, keep in zip(anchors.split(levels), inside.split(levels), strict=True)
    ]
    assigned = torch.full((len(anchors),), -2)
    assigned[inside] = head.assigner(kept, instances.gt_boxes.tensor)
    report.exact(f"{name}.assign[{image}].gt_inds_all", assigned + 1)
    overlaps = report.entries[f"{name}.assign[{image}].max_overlaps_all"]
    iou = pairwise_iou(Boxes(anchors), instances.gt_boxes)
    row = torch.arange(len(anchors))
    found = assigned >= 0
    ours = (
        torch.where(found, iou[row, assigned.clamp(min=0)], -1e8) if len(instances) else iou.sum(1)
    )
    worst = (overlaps - ours)[inside].abs().max().item()
    note = f"{worst:.1e} abs inside the image, at most {tol.GEOMETRY:.1e}"
    report.verdict(f"{name}.assign[{image}].max_overlaps_all", worst <= tol.GEOMETRY, note)


def _check_centreness(report, name, anchors, targets, positive, counts) -> None:
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
    if report.has(f"{name}.centerness_targets") or outputs:
        report.close(f"{name}.centerness_inputs", inputs, tol.BOX_PIXELS)
        report.close(f"{name}.centerness_targets", outputs, tol.GEOMETRY)
