"""Compares the RPN of a training step, and names where Detectron2 differs by design."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

from co_detr.modeling.auxiliary.atss import inside_cells
from co_detr.parity import tolerances as tol
from co_detr.parity.feed import level_order
from co_detr.parity.report import Report
from co_detr.parity.train_run import TrainingRun

PADDING = "rpn-padding: Detectron2 also trains anchors in the batch padding"
LOW_QUALITY = (
    "rpn-low-quality: mmdet needs IoU >= 0.3 for a ground truth's best anchor and hands it over; "
    "Detectron2 takes any best anchor and keeps its arg-max"
)


@torch.no_grad()
def check_rpn(report: Report, prefix: str, run: TrainingRun) -> None:
    """All entries below ``<prefix>.rpn``."""
    name = f"{prefix}.rpn"
    rpn = run.model.auxiliary.heads["roi"].rpn
    anchors = rpn.anchor_generator([run.pyramid[f] for f in rpn.in_features])
    counts = [len(level) for level in anchors]
    # Row d of Detectron2's order is row order[d] of the reference's.
    order = level_order(counts, rpn.anchor_generator.num_anchors[0])
    flat = _to_reference(torch.cat([level.tensor for level in anchors]), order)
    if report.has(f"{name}.anchors"):
        report.close(f"{name}.anchors", list(flat.split(counts)), tol.BOX_PIXELS)
    if report.has(f"{name}.objectness"):
        num_anchors = rpn.anchor_generator.num_anchors[0]
        report.close(
            f"{name}.objectness", [_channels(m, num_anchors, 1) for m in run.objectness], tol.LOGIT
        )
        report.close(
            f"{name}.deltas", [_channels(m, num_anchors, 4) for m in run.rpn_deltas], tol.LOGIT
        )
    _check_proposals(report, name, run, rpn, anchors)
    _check_assignment(report, name, run, rpn, flat)
    _check_targets(report, name, run, rpn, flat, counts)


def _to_reference(rows: Tensor, order: Tensor) -> Tensor:
    out = torch.empty_like(rows)
    out[order] = rows
    return out


def _channels(maps: Tensor, num_anchors: int, width: int) -> Tensor:
    """``(B, A * width, H, W)`` from Detectron2's anchor order to the reference's."""
    grouped = maps.unflatten(1, (num_anchors // 3, 3, width))
    return grouped.transpose(1, 2).flatten(1, 3)


def _check_proposals(report: Report, name: str, run: TrainingRun, rpn, anchors) -> None:
    objectness = [m.permute(0, 2, 3, 1).flatten(1) for m in run.objectness]
    deltas = [m.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in run.rpn_deltas]
    proposals = rpn.predict_proposals(anchors, objectness, deltas, run.images.image_sizes)
    for image, found in enumerate(proposals):
        scores = found.objectness_logits.sigmoid()[:, None]
        rows = torch.cat([found.proposal_boxes.tensor, scores], dim=1)
        report.rows(f"{name}.proposals[{image}]", rows, tol.BOX_PIXELS)


def _check_assignment(report: Report, name: str, run: TrainingRun, rpn, anchors: Tensor) -> None:
    """Matcher against matcher wherever neither uses its low-quality rule."""
    for image, instances in enumerate(run.case.ground_truth(torch.float32)):
        key = f"{name}.assign[{image}]"
        reference = run.entries["rpn"]["assign"][image]["gt_inds_all"]
        inside = reference != -3
        iou = pairwise_iou(instances.gt_boxes, Boxes(anchors))
        matched, labels = rpn.anchor_matcher(iou)
        ours = torch.where(labels > 0, matched + 1, labels.long())
        best = iou.max(0).values if len(iou) else iou.new_zeros(len(anchors))
        overlaps = report.entries[f"{key}.max_overlaps_all"]
        worst = (overlaps - best)[inside].abs().max().item()
        report.verdict(f"{key}.max_overlaps_all", worst < tol.GEOMETRY, f"{worst:.1e} abs, inside")
        # An anchor is low-quality where it is positive without reaching the IoU of 0.7, or was
        # handed over to a ground truth for which it is the best anchor of all.
        differs = inside & (ours != reference)
        is_best = _is_best_anchor(iou, inside) | _is_best_anchor(iou, torch.ones_like(inside))
        unexplained = int((differs & ~is_best).sum())
        note = f"{LOW_QUALITY}: {int(differs.sum())} anchors; {PADDING}: {int((~inside).sum())}"
        report.known(f"{key}.gt_inds_all", f"{note}; all others equal", unexplained == 0)


def _is_best_anchor(iou: Tensor, allowed: Tensor) -> Tensor:
    """``(R,)`` bool: the anchor has the highest IoU of some ground truth among allowed ones."""
    if not len(iou):
        return torch.zeros_like(allowed)
    iou = iou.masked_fill(~allowed, -1.0)
    return (iou >= iou.max(1, keepdim=True).values - 1e-6).any(0)


def _check_targets(
    report: Report, name: str, run: TrainingRun, rpn, anchors: Tensor, counts: list[int]
) -> None:
    targets = run.entries["rpn"]["targets"]
    for entry in ("labels", "label_weights", "num_total_pos", "num_total_neg"):
        report.given(f"{name}.targets.{entry}", "fed to Detectron2's losses")
    report.given(f"{name}.sampled", "the draw behind the fed labels")
    if report.has(f"{name}.targets.delta_targets"):
        boxes = []
        for image, gt_boxes in enumerate(run.case.own["gt_boxes_xyxy"]):
            found = run.entries["rpn"]["assign"][image]["gt_inds_all"].clamp(min=0)
            padded = torch.cat([anchors.new_zeros(1, 4), gt_boxes])
            is_positive = torch.cat([level[image] for level in targets["labels"]]) == 0
            matched = torch.where(is_positive[:, None], padded[found], anchors)
            boxes.append(rpn.box2box_transform.get_deltas(anchors, matched))
        deltas = list(torch.stack(boxes).split(counts, dim=1))
        report.close(f"{name}.targets.delta_targets", deltas, tol.GEOMETRY)
    if report.has(f"{name}.valid_flags"):
        head = run.model.auxiliary.heads["atss"]
        flags = [
            [
                inside_cells(run.pyramid[f], stride, size).repeat_interleave(
                    rpn.anchor_generator.num_anchors[0]
                )
                for f, stride in zip(rpn.in_features, head.strides, strict=True)
            ]
            for size in run.images.image_sizes
        ]
        report.exact(f"{name}.valid_flags", flags)
