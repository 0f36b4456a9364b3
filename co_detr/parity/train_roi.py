"""Compares the ROI head of a training step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import Tensor

from co_detr.parity import tolerances as tol
from co_detr.parity.compare import Deviation
from co_detr.parity.differences import ROI_GT_ORDER
from co_detr.parity.report import Report
from co_detr.parity.rpn_rule import match
from co_detr.parity.train_run import TrainingRun


@torch.no_grad()
def check_roi(report: Report, prefix: str, run: TrainingRun) -> None:
    """All entries below ``<prefix>.roi``."""
    name, entries = f"{prefix}.roi", run.entries["roi"]
    report.close(f"{name}.cls_score", run.scores, tol.LOGIT)
    report.close(f"{name}.bbox_pred", run.deltas, tol.LOGIT)
    report.close(f"{name}.feats_mean", run.pooled.mean((2, 3)), tol.MAP)
    first = report.entries.get(f"{name}.feats_first8", ())
    report.close(f"{name}.feats_first8", run.pooled[: len(first)], tol.MAP)
    report.given(f"{name}.rois", "the reference's samples, fed to the head")

    head = run.model.auxiliary.heads["roi"].roi_heads
    samples = []
    for image, truth in enumerate(run.case.ground_truth()):
        proposals = Boxes(run.entries["rpn"]["proposals"][image][:, :4])
        _check_assignment(report, f"{name}.assign[{image}]", head, proposals, truth)
        key, reference = f"{name}.sampling[{image}]", entries["sampling"][image]
        pool = _Pool.of(head, proposals, truth)
        sample = pool.chosen(reference)
        _check_sampling(report, key, head, pool, sample, reference)
        samples.append(sample)

    # The fed targets are those that Detectron2 gives to the same samples.
    foreground = torch.cat([each.gt_classes < head.num_classes for each in samples])
    report.exact(f"{name}.targets.labels", torch.cat([each.gt_classes for each in samples]))
    boxes = torch.cat([each.gt_boxes.tensor for each in samples]) * foreground[:, None]
    report.close(f"{name}.targets.bbox_targets", boxes, tol.GEOMETRY_PIXELS)
    # Detectron2 has no weights: every sample counts once, boxes where there is an object.
    report.exact(f"{name}.targets.label_weights", torch.ones(len(run.scores)))
    report.exact(f"{name}.targets.bbox_weights", foreground[:, None].float().expand(-1, 4))


def _check_assignment(
    report: Report, name: str, head: ROIHeads, proposals: Boxes, truth: Instances
) -> None:
    """Detectron2's matcher on the reference's proposals."""
    overlaps = pairwise_iou(truth.gt_boxes, proposals)
    found = match(head.proposal_matcher, overlaps)
    best = overlaps.amax(0) if len(overlaps) else overlaps.new_zeros(len(proposals))
    report.exact(f"{name}.gt_inds", found)
    report.close(f"{name}.max_overlaps", best, tol.GEOMETRY)
    # mmdet marks background with -1 here, and only here.
    classes = torch.cat([torch.tensor([-1]), truth.gt_classes])
    report.exact(f"{name}.labels", classes[found])


@dataclass(frozen=True)
class _Pool:
    """All that Detectron2 may sample of an image, in mmdet's order: ground truths, proposals.

    Attributes:
        instances: with ``proposal_boxes``, ``gt_classes``, ``gt_boxes`` and ``gt_number``, the
            index of the matched ground truth; the latter two are zeros without ground truths.
    """

    instances: Instances
    num_classes: int
    num_truths: int

    @classmethod
    def of(cls, head: ROIHeads, proposals: Boxes, truth: Instances) -> _Pool:
        """Lets ``head`` sample without a limit."""
        size, count = truth.image_size, len(truth)
        candidates = Instances(
            size,
            proposal_boxes=proposals,
            objectness_logits=torch.zeros(len(proposals)),
            place=torch.arange(len(proposals)) + count,
        )
        numbered = Instances(
            size, **truth.get_fields(), gt_number=torch.arange(count), place=torch.arange(count)
        )
        saved = head.batch_size_per_image
        head.batch_size_per_image = 10**6
        with EventStorage():
            # Of the class, because the instance is fed with the reference's samples.
            (sample,) = type(head).label_and_sample_proposals(head, [candidates], [numbered])
        head.batch_size_per_image = saved
        if not sample.has("gt_boxes"):
            sample.gt_boxes = Boxes(torch.zeros(len(sample), 4))
            sample.gt_number = torch.zeros(len(sample), dtype=torch.long)
        return cls(sample[sample.place.argsort()], head.num_classes, count)

    def places(self, foreground: bool) -> Tensor:
        """Indices into the pool."""
        return ((self.instances.gt_classes < self.num_classes) == foreground).nonzero().squeeze(1)

    def chosen(self, reference: dict) -> Instances:
        """The reference's samples, positives first, with Detectron2's boxes and targets."""
        return self.instances[torch.cat([reference["pos_inds"], reference["neg_inds"]])]


def _check_sampling(
    report: Report, name: str, head: ROIHeads, pool: _Pool, sample: Instances, reference: dict
) -> None:
    """Indices against our pool; a draw must be a possible one of the official size."""
    positives, negatives = pool.places(foreground=True), pool.places(foreground=False)
    limit = int(head.batch_size_per_image * head.positive_fraction)
    drawn_pos = min(len(positives), limit)
    drawn_neg = min(len(negatives), head.batch_size_per_image - drawn_pos)
    counts = len(reference["pos_inds"]), len(reference["neg_inds"])
    is_draw = counts != (len(positives), len(negatives))
    possible = not is_draw or counts == (drawn_pos, drawn_neg)
    for entry, places in (("pos_inds", positives), ("neg_inds", negatives)):
        found = reference[entry]
        wrong = int((~torch.isin(found, places)).sum()) + len(found) - len(found.unique())
        note = "a possible draw" if is_draw else "all there are"
        right = Deviation(possible and not wrong, float(wrong), ratio=float(wrong))
        report.record(f"{name}.{entry}", right, "equal", note, ROI_GT_ORDER)
    pos, neg = sample[: counts[0]], sample[counts[0] :]
    for entry, boxes in (
        ("pos_bboxes", pos.proposal_boxes),
        ("neg_bboxes", neg.proposal_boxes),
        ("pos_gt_bboxes", pos.gt_boxes),
    ):
        report.close(f"{name}.{entry}", boxes.tensor, tol.GEOMETRY_PIXELS)
    report.exact(f"{name}.pos_assigned_gt_inds", pos.gt_number)
    report.exact(f"{name}.pos_gt_labels", pos.gt_classes)
    report.exact(f"{name}.pos_is_gt", (pos.place < pool.num_truths).to(torch.uint8))
