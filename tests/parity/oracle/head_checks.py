"""Compares the auxiliary heads of a training step: RPN, ROI head, ATSS.

Names where Detectron2 differs by design: it matches RPN anchors by another rule than mmdet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import Tensor

from co_detr.modeling.auxiliary import ATSSHead
from co_detr.modeling.auxiliary.dense_head import InsideCells
from co_detr.modeling.auxiliary.dense_losses import DenseTargets, centerness_target
from tests.parity.oracle import tolerances as tol
from tests.parity.oracle.eval_mode import compare_proposals
from tests.parity.oracle.report import Deviation, Report
from tests.parity.oracle.tolerances import (
    ROI_GT_ORDER,
    RPN_LOW_QUALITY,
    RPN_NORMALIZER,
    RPN_PADDING,
)
from tests.parity.oracle.training import (
    TrainingRun,
    channels_to_reference,
    level_order,
    to_reference,
)

OUTSIDE = -3  # mark of anchors outside their own image, which the reference never uses
THRESHOLDS, LABELS = (0.3, 0.7), (0, -1, 1)
LOW_QUALITY_IOU = 0.3
UNASSIGNED = -1e8  # the reference's overlap of an anchor without a ground truth


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
        _check_rpn_assignment(report, f"{name}.assign[{image}]", rpn, flat, truth, reference)
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


def _check_rpn_assignment(
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
    report.given(f"{name}.num_total_pos", fed, RPN_NORMALIZER)
    report.given(f"{name}.num_total_neg", fed, RPN_NORMALIZER)
    labels = torch.cat(run.entries["rpn"]["targets"]["labels"], dim=1)  # 0 means object
    boxes = []
    for image, gt_boxes in enumerate(run.case.own["gt_boxes_xyxy"]):
        found = run.entries["rpn"]["assign"][image]["gt_inds_all"].clamp(min=0)
        padded = torch.cat([anchors.new_zeros(1, 4), gt_boxes])
        matched = torch.where((labels[image] == 0)[:, None], padded[found], anchors)
        boxes.append(rpn.box2box_transform.get_deltas(anchors, matched))
    deltas = list(torch.stack(boxes).split(counts, dim=1))
    report.close(f"{name}.delta_targets", deltas, tol.GEOMETRY)


def match(matcher: Matcher, overlaps: Tensor) -> Tensor:
    """``(G, R)`` -> ``(R,)``: 1-based ground truth, 0 for background, -1 for ignored."""
    truths, labels = matcher(overlaps)
    return torch.where(labels > 0, truths + 1, labels.long())


def rpn_matcher(allow_low_quality: bool) -> Matcher:
    return Matcher(list(THRESHOLDS), list(LABELS), allow_low_quality_matches=allow_low_quality)


def reference_rule(overlaps: Tensor) -> Tensor:
    """What mmdet assigns, ``(G, R)`` -> ``(R,)`` as ``match``.

    Ground truths in order: the anchors of highest overlap become positive for a ground truth if
    that overlap is at least 0.3, whatever they were before.
    """
    assigned = match(rpn_matcher(allow_low_quality=False), overlaps)
    for truth, row in enumerate(overlaps):
        if row.numel() and row.max() >= LOW_QUALITY_IOU:
            assigned[row == row.max()] = truth + 1
    return assigned


@dataclass(frozen=True)
class RPNAssignment:
    """Detectron2's assignment beside the reference's, over anchors that both look at.

    Attributes:
        differing: number of anchors assigned differently.
        explained: the reference's assignment follows from mmdet's rule to the last anchor, and
            all that differ are best anchors of some ground truth for one of the two.
    """

    differing: int
    explained: bool

    @classmethod
    def compare(
        cls, matcher: Matcher, overlaps: Tensor, reference: Tensor, seen: Tensor
    ) -> RPNAssignment:
        """Compares Detectron2's ``matcher`` with the reference.

        Args:
            overlaps: ``(G, R)`` IoU with all anchors, which Detectron2 considers.
            reference: ``(R,)`` the reference's assignment, 1-based.
            seen: ``(R,)`` bool, anchors that the reference considers.
        """
        differs = (match(matcher, overlaps) != reference) & seen
        is_best = _is_best(overlaps, torch.ones_like(seen)) | _is_best(overlaps, seen)
        same_rule = torch.equal(reference_rule(overlaps[:, seen]), reference[seen])
        return cls(int(differs.sum()), same_rule and bool(is_best[differs].all()))


def _is_best(overlaps: Tensor, allowed: Tensor) -> Tensor:
    """``(R,)`` bool: no allowed anchor overlaps some ground truth more than this one."""
    if not overlaps.numel():
        return torch.zeros_like(allowed)
    allowed_overlaps = overlaps.masked_fill(~allowed, -1.0)
    return (allowed_overlaps == allowed_overlaps.amax(1, keepdim=True)).any(0)


@torch.no_grad()
def check_roi(report: Report, prefix: str, run: TrainingRun) -> None:
    """All entries below ``<prefix>.roi``."""
    name, entries = f"{prefix}.roi", run.entries["roi"]
    report.close(f"{name}.cls_score", run.scores, tol.LOGIT)
    report.close(f"{name}.bbox_pred", run.deltas, tol.LOGIT)
    report.close(f"{name}.feats_mean", run.pooled.mean((2, 3)), tol.MAP)
    first = report.entries.get(f"{name}.feats_first8", ())
    report.close(f"{name}.feats_first8", run.pooled[: len(first)], tol.MAP)
    if report.has(f"{name}.feats_first4"):  # of instance segmentation
        report.close(f"{name}.feats_first4", run.pooled[:4], tol.MAP)
    report.given(f"{name}.rois", "the reference's samples, fed to the head")

    head = run.model.auxiliary.heads["roi"].roi_heads
    samples = []
    for image, truth in enumerate(run.case.ground_truth()):
        proposals = Boxes(run.entries["rpn"]["proposals"][image][:, :4])
        _check_roi_assignment(report, f"{name}.assign[{image}]", head, proposals, truth)
        key, reference = f"{name}.sampling[{image}]", entries["sampling"][image]
        pool = _Pool.of(head, proposals, truth)
        sample = pool.chosen(reference)
        _check_sampling(report, key, head, pool, sample, reference)
        samples.append(sample)

    # The fed targets are those that Detectron2 gives to the same samples.
    foreground = torch.cat([sample.gt_classes < head.num_classes for sample in samples])
    report.exact(f"{name}.targets.labels", torch.cat([sample.gt_classes for sample in samples]))
    boxes = torch.cat([sample.gt_boxes.tensor for sample in samples]) * foreground[:, None]
    report.close(f"{name}.targets.bbox_targets", boxes, tol.GEOMETRY_PIXELS)
    # Detectron2 has no weights: every sample counts once, boxes where there is an object.
    report.exact(f"{name}.targets.label_weights", torch.ones(len(run.scores)))
    report.exact(f"{name}.targets.bbox_weights", foreground[:, None].float().expand(-1, 4))


def _check_roi_assignment(
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
        _check_atss_assignment(report, key, head, anchors, targets.inside[image], instances)

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
    boxes = [instances.proposal_boxes.tensor for instances in candidates]
    report.close(f"{name}.anchors_unmapped", boxes, tol.GEOMETRY_PIXELS)
    report.exact(f"{name}.labels_per_image", [instances.gt_classes for instances in candidates])
    boxes = [instances.gt_boxes.tensor for instances in candidates]
    report.close(f"{name}.bbox_targets_per_image", boxes, tol.GEOMETRY_PIXELS)
    _check_centerness(report, f"{prefix}.atss", torch.cat(anchors), targets, positive, counts)


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


def _check_atss_assignment(
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


def _check_centerness(
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
        outputs.append(centerness_target(*chosen))
    report.close(f"{name}.centerness_inputs", inputs, tol.GEOMETRY_PIXELS)
    report.close(f"{name}.centerness_targets", outputs, tol.GEOMETRY)
