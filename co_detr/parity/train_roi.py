"""Compares the ROI head of a training step."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage

from co_detr.parity import tolerances as tol
from co_detr.parity.report import Report
from co_detr.parity.train_run import TrainingRun


@torch.no_grad()
def check_roi(report: Report, prefix: str, run: TrainingRun) -> None:
    """All entries below ``<prefix>.roi``."""
    name, entries = f"{prefix}.roi", run.entries["roi"]
    report.close(f"{name}.cls_score", run.scores, tol.LOGIT)
    report.close(f"{name}.bbox_pred", run.deltas, tol.LOGIT)
    if report.has(f"{name}.feats_mean"):
        report.close(f"{name}.feats_mean", run.pooled.mean((2, 3)), tol.MAP)
        report.close(f"{name}.feats_first8", run.pooled[: len(entries["feats_first8"])], tol.MAP)
    report.given(f"{name}.rois", "the reference's samples, fed to the head")
    targets = entries["targets"]
    report.given(f"{name}.targets.labels", "fed with the samples")
    report.given(f"{name}.targets.bbox_targets", "fed with the samples")
    # Detectron2 has no such weights: every sample counts once, boxes where there is an object.
    report.exact(f"{name}.targets.label_weights", torch.ones(len(run.scores)))
    foreground = (targets["labels"] < run.case.num_classes).float()
    report.exact(f"{name}.targets.bbox_weights", foreground[:, None].expand(-1, 4))
    for image, instances in enumerate(run.case.ground_truth(torch.float32)):
        _check_assignment(report, name, run, image, instances)
        _check_sampling(report, name, run, image, instances)


def _check_assignment(
    report: Report, name: str, run: TrainingRun, image: int, instances: Instances
) -> None:
    """Detectron2's matcher on the reference's proposals."""
    key = f"{name}.assign[{image}]"
    proposals = Boxes(run.entries["rpn"]["proposals"][image][:, :4])
    iou = pairwise_iou(instances.gt_boxes, proposals)
    matched, labels = run.model.auxiliary.heads["roi"].roi_heads.proposal_matcher(iou)
    best = iou.max(0).values if len(iou) else iou.new_zeros(len(proposals))
    report.exact(f"{key}.gt_inds", torch.where(labels > 0, matched + 1, 0))
    report.close(f"{key}.max_overlaps", best, tol.GEOMETRY)
    classes = torch.cat([instances.gt_classes, torch.tensor([-1])])
    found = torch.where(labels > 0, matched, len(instances))
    # mmdet marks background with -1 here, and only here.
    report.exact(f"{key}.labels", classes[found])


def _check_sampling(
    report: Report, name: str, run: TrainingRun, image: int, instances: Instances
) -> None:
    """Samples as a set: Detectron2 appends ground truths to proposals, mmdet prepends them.

    With a finite budget the negatives are a random draw; then each must be a possible one.
    """
    key = f"{name}.sampling[{image}]"
    entries = run.entries["roi"]["sampling"][image]
    head = run.model.auxiliary.heads["roi"].roi_heads
    proposals = Instances(
        instances.image_size,
        proposal_boxes=Boxes(run.entries["rpn"]["proposals"][image][:, :4]),
        objectness_logits=torch.zeros(len(run.entries["rpn"]["proposals"][image])),
    )
    saved = head.batch_size_per_image
    head.batch_size_per_image = 10**6  # everything
    with EventStorage():
        (sample,) = type(head).label_and_sample_proposals(head, [proposals], [instances])
    head.batch_size_per_image = saved
    is_foreground = sample.gt_classes < run.case.num_classes
    ours_pos = sample.proposal_boxes.tensor[is_foreground]
    ours_neg = sample.proposal_boxes.tensor[~is_foreground]
    positives, negatives = entries["pos_bboxes"], entries["neg_bboxes"]
    same_pos = _rows(positives) == _rows(ours_pos)
    drawn = len(positives) + len(negatives) < len(sample)
    same_neg = _rows(negatives) <= _rows(ours_neg) if drawn else _rows(negatives) == _rows(ours_neg)
    matched = torch.cat([positives, entries["pos_gt_bboxes"]], 1)
    ours_matched = torch.zeros(0, 8)
    if sample.has("gt_boxes"):
        both = [sample.proposal_boxes.tensor, sample.gt_boxes.tensor]
        ours_matched = torch.cat(both, 1)[is_foreground]
    note = "the same set of boxes" + (" (negatives: a possible draw)" if drawn else "")
    for entry, ok in (
        ("pos_inds", same_pos),
        ("pos_bboxes", same_pos),
        ("pos_is_gt", same_pos),
        ("neg_inds", same_neg),
        ("neg_bboxes", same_neg),
        ("pos_assigned_gt_inds", _rows(matched) == _rows(ours_matched)),
        ("pos_gt_bboxes", _rows(matched) == _rows(ours_matched)),
    ):
        report.verdict(f"{key}.{entry}", ok, note)
    labels = torch.cat([positives, entries["pos_gt_labels"][:, None].float()], 1)
    ours_labels = torch.cat([ours_pos, sample.gt_classes[is_foreground, None].float()], 1)
    report.verdict(f"{key}.pos_gt_labels", _rows(labels) == _rows(ours_labels), note)


def _rows(boxes: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in boxes.tolist()}
