"""Compares the RPN of a training step, and names where Detectron2 differs by design."""

from __future__ import annotations

import torch
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from co_detr.modeling.auxiliary.dense import InsideCells
from co_detr.parity import tolerances as tol
from co_detr.parity.anchor_order import channels_to_reference, level_order, to_reference
from co_detr.parity.detections import compare_proposals
from co_detr.parity.differences import RPN_LOW_QUALITY, RPN_NORMALISER, RPN_PADDING
from co_detr.parity.report import Report
from co_detr.parity.rpn_rule import RPNAssignment
from co_detr.parity.train_run import TrainingRun

OUTSIDE = -3  # mark of anchors outside their own image, which the reference never uses


@torch.no_grad()
def check_rpn(report: Report, prefix: str, run: TrainingRun) -> None:
    """All entries below ``<prefix>.rpn``."""
    name = f"{prefix}.rpn"
    rpn = run.model.auxiliary.heads["roi"].rpn
    maps = [run.pyramid[feature] for feature in rpn.in_features]
    anchors = rpn.anchor_generator(maps)
    counts = [len(level) for level in anchors]
    per_cell = rpn.anchor_generator.num_anchors[0]
    order = level_order(counts, per_cell)
    flat = to_reference(torch.cat([level.tensor for level in anchors]), order)
    report.close(f"{name}.anchors", list(flat.split(counts)), tol.GEOMETRY_PIXELS)
    for entry, levels in (("objectness", run.objectness), ("deltas", run.rpn_deltas)):
        ours = [channels_to_reference(level, per_cell) for level in levels]
        report.close(f"{name}.{entry}", ours, tol.LOGIT)
    _check_proposals(report, name, run, rpn, anchors)
    for image, truth in enumerate(run.case.ground_truth()):
        reference = run.entries["rpn"]["assign"][image]
        _check_assignment(report, f"{name}.assign[{image}]", rpn, flat, truth, reference)
    _check_targets(report, f"{name}.targets", run, rpn, flat, counts)
    report.given(f"{name}.sampled", "the draw behind the fed labels")
    # Our RPN has no such flags; these are the ones that our ATSS head finds for the same maps.
    flags = [
        [
            InsideCells.of(level, stride, size, per_cell).mask()
            for level, stride in zip(maps, rpn.anchor_generator.strides, strict=True)
        ]
        for size in run.images.image_sizes
    ]
    report.exact(f"{name}.valid_flags", flags, difference=RPN_PADDING)


def _check_proposals(
    report: Report, name: str, run: TrainingRun, rpn: RPN, anchors: list[Boxes]
) -> None:
    objectness = [m.permute(0, 2, 3, 1).flatten(1) for m in run.objectness]
    deltas = [m.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in run.rpn_deltas]
    proposals = rpn.predict_proposals(anchors, objectness, deltas, run.images.image_sizes)
    for image, found in enumerate(proposals):
        boxes, scores = found.proposal_boxes.tensor, found.objectness_logits.sigmoid()
        compare_proposals(report, f"{name}.proposals[{image}]", boxes, scores)


def _check_assignment(
    report: Report, name: str, rpn: RPN, anchors: Tensor, truth: Instances, reference: dict
) -> None:
    """Matcher against matcher; what differs must follow from the two differences by design."""
    indices = reference["gt_inds_all"]
    inside = indices != OUTSIDE
    overlaps = pairwise_iou(truth.gt_boxes, Boxes(anchors))
    best = overlaps.amax(0) if len(overlaps) else overlaps.new_zeros(len(anchors))
    best = best * inside  # the reference does not compute the others
    report.close(f"{name}.max_overlaps_all", best, tol.GEOMETRY)

    found = RPNAssignment.compare(rpn.anchor_matcher, overlaps, indices, inside)
    entry, outside = f"{name}.gt_inds_all", int((~inside).sum())
    padding = f"{outside} anchors in the padding"
    if found.differing:
        note = f"{found.differing} anchors" + (
            f"; {RPN_PADDING.name}: {padding}" if outside else ""
        )
        report.known(entry, RPN_LOW_QUALITY, found.explained, note)
    elif outside:
        report.known(entry, RPN_PADDING, True, f"{padding}; all others equal")
    else:
        report.exact(entry, indices, note="equal to Detectron2's")


def _check_targets(
    report: Report, name: str, run: TrainingRun, rpn: RPN, anchors: Tensor, counts: list[int]
) -> None:
    fed = "fed to Detectron2's losses"
    report.given(f"{name}.labels", fed, RPN_LOW_QUALITY)
    report.given(f"{name}.label_weights", fed, RPN_PADDING)
    report.given(f"{name}.num_total_pos", fed, RPN_NORMALISER)
    report.given(f"{name}.num_total_neg", fed, RPN_NORMALISER)
    labels = torch.cat(run.entries["rpn"]["targets"]["labels"], dim=1)  # 0 means object
    boxes = []
    for image, gt_boxes in enumerate(run.case.own["gt_boxes_xyxy"]):
        found = run.entries["rpn"]["assign"][image]["gt_inds_all"].clamp(min=0)
        padded = torch.cat([anchors.new_zeros(1, 4), gt_boxes])
        matched = torch.where((labels[image] == 0)[:, None], padded[found], anchors)
        boxes.append(rpn.box2box_transform.get_deltas(anchors, matched))
    deltas = list(torch.stack(boxes).split(counts, dim=1))
    report.close(f"{name}.delta_targets", deltas, tol.GEOMETRY)
