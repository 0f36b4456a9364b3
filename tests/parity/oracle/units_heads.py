"""Checks of single functions: anchors, assignment, box losses and codes, pooling, suppression."""

from __future__ import annotations

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes, pairwise_iou
from detectron2.structures.boxes import matched_pairwise_iou

from co_detr.modeling.auxiliary import ATSSAssigner, ATSSHead
from co_detr.modeling.auxiliary.dense_head import InsideCells
from co_detr.modeling.auxiliary.dense_losses import centerness_target, decode_deltas
from co_detr.modeling.geometry import Geometry
from co_detr.modeling.losses import (
    FocalLoss,
    HungarianAssigner,
    MatchingProblem,
    SetCriterion,
    generalized_iou,
    normalize_boxes,
    solve_assignment,
    xyxy_to_cxcywh,
)
from co_detr.structures import AssignedTargets, GroundTruth, Predictions
from tests.parity.oracle.head_checks import RPNAssignment, match, rpn_matcher
from tests.parity.oracle.report import FLOAT32, Unit, level_shapes
from tests.parity.oracle.tolerances import DELTA_CLAMP, RPN_LOW_QUALITY
from tests.parity.oracle.units_transformer import check_soft_nms

OCTAVES, RATIOS = 3, (0.5, 1.0, 2.0)


def linear_sum_assignment(unit: Unit) -> None:
    matched = torch.from_numpy(solve_assignment(unit["cost"][None].numpy()))[0]
    rows = (matched >= 0).nonzero().squeeze(1)
    unit.exact("row_ind", rows)
    unit.exact("col_ind", matched[rows])


def hungarian_assigner(unit: Unit) -> None:
    """Cost terms one by one, then the assignment as targets."""
    logits, size = unit["cls_logits"], tuple(unit["image_hw"])
    (factor,) = Geometry.of([size], size, logits.device).factors
    truth = GroundTruth(unit["gt_labels"], normalize_boxes(unit["gt_boxes_xyxy"], factor), factor)
    predictions = Predictions(logits[None, None], unit["boxes_cxcywh_norm"][None, None])
    assigner, off = HungarianAssigner(), dict(class_weight=0.0, bbox_weight=0.0, giou_weight=0.0)
    for key, weight in (
        ("cost_cls", "class_weight"),
        ("cost_l1", "bbox_weight"),
        ("cost_giou", "giou_weight"),
    ):
        if unit.has(key):  # the reference computes none for an image without ground truth
            term = HungarianAssigner(**{**off, weight: getattr(assigner, weight)})
            unit.close(key, term.cost(predictions, 0, truth)[0])

    num_classes = logits.shape[1]
    (targets,) = assigner([MatchingProblem(predictions, [truth], num_classes)])
    labels, boxes = targets.labels[0, 0], targets.boxes[0, 0]
    is_matched = labels < num_classes
    unit.exact("labels", torch.where(is_matched, labels, -1))
    # Targets name no index; the boxes of the entries differ from each other, so they tell.
    numbers = torch.arange(1, len(truth.boxes) + 1)
    same = (boxes[:, None] == truth.boxes[None]).all(-1) & is_matched[:, None]
    unit.exact("gt_inds", (same * numbers).sum(1))


def anchors(unit: Unit) -> None:
    """RPN anchors lie ratio-major in the reference, size-major in Detectron2: permuted here."""
    kind, strides = unit["kind"], unit["strides"]
    maps = [torch.zeros(1, 1, *shape) for shape in unit["featmap_sizes_hw"]]
    if kind == "atss":
        generator = ATSSHead(
            num_classes=1,
            embed_dim=32,
            in_features=[str(stride) for stride in strides],
            strides=strides,
            assigner=ATSSAssigner(),
        ).anchor_generator
    else:
        generator = DefaultAnchorGenerator(
            sizes=[[4 * stride * 2 ** (i / OCTAVES) for i in range(OCTAVES)] for stride in strides],
            aspect_ratios=list(RATIOS),
            strides=strides,
            offset=0.0,
        )
    order, note = torch.arange(generator.num_anchors[0]), ""
    if kind == "rpn":
        note = "ratio-major in the reference, ours permuted"
        order = order.view(OCTAVES, len(RATIOS)).t().flatten()
    unit.close("base_anchors", [cell[order] for cell in generator.cell_anchors], note=note)
    grid = [boxes.tensor.view(-1, len(order), 4)[:, order] for boxes in generator(maps)]
    unit.close("grid_anchors", [boxes.flatten(0, 1) for boxes in grid], note=note)


def valid_flags(unit: Unit) -> None:
    size = tuple(unit["pad_shape_hw"])
    levels = zip(level_shapes(unit["featmap_sizes_hw"]), unit["strides"], strict=True)
    flags = [InsideCells.of(torch.zeros(shape), stride, size).mask() for shape, stride in levels]
    unit.exact("flags", flags)


def atss_assigner(unit: Unit) -> None:
    """Our assigner returns no overlaps; they are recomputed for the pairs that it made."""
    _ = unit["name"]
    boxes, gt_boxes, gt_labels = unit["anchors"], unit["gt_boxes_xyxy"], unit["gt_labels"]
    assigned = ATSSAssigner()(list(boxes.split(unit["num_level_anchors"])), gt_boxes)
    positive = assigned >= 0
    unit.exact("gt_inds", assigned + 1)
    labels = torch.full_like(assigned, -1)
    labels[positive] = gt_labels[assigned[positive]]
    unit.exact("labels", labels)
    # The reference's marks: -1e8 for an anchor without a ground truth, 0 in an empty image.
    overlaps = boxes.new_full((len(boxes),), -1e8 if len(gt_boxes) else 0.0)
    pairs = pairwise_iou(Boxes(boxes), Boxes(gt_boxes))[positive]
    overlaps[positive] = pairs.gather(1, assigned[positive, None]).squeeze(1)
    # Absolute, or the marks would allow anything.
    unit.close("max_overlaps", overlaps, rtol=0, atol=FLOAT32)


def max_iou_assigner(unit: Unit) -> None:
    """Detectron2's matchers; the one for RPN anchors has another low-quality rule by design."""
    kind, _ = unit["kind"], unit["name"]
    overlaps = pairwise_iou(Boxes(unit["gt_boxes_xyxy"]), Boxes(unit["boxes"]))  # (G, R)
    best = overlaps.amax(0) if len(overlaps) else overlaps.new_zeros(overlaps.shape[1])
    unit.close("max_overlaps", best)
    if kind == "rcnn":
        matcher = Matcher([0.5], [0, 1], allow_low_quality_matches=False)
        unit.exact("gt_inds", match(matcher, overlaps))
        return
    matcher, expected = rpn_matcher(allow_low_quality=True), unit.expected("gt_inds")
    everywhere = torch.ones(overlaps.shape[1], dtype=torch.bool)
    found = RPNAssignment.compare(matcher, overlaps, expected, everywhere)
    if found.differing:
        unit.known("gt_inds", RPN_LOW_QUALITY, found.explained, f"{found.differing} anchors")
    else:
        unit.exact("gt_inds", match(matcher, overlaps))


def giou(unit: Unit) -> None:
    """The overlap itself, then the loss of the criterion.

    The criterion takes normalized cxcywh boxes; here the image has one pixel, and float64 makes
    the way there and back exact.
    """
    originals, target = unit["pred"], unit["target"]
    unit.close("giou_aligned", generalized_iou(originals, target))
    unit.close("iou_aligned", matched_pairwise_iou(Boxes(originals), Boxes(target)))
    rows = len(unit.expected("giou_pairwise"))
    unit.close("giou_pairwise", generalized_iou(originals[:rows, None], target[None]))
    pred = originals.double().requires_grad_()
    loss = _criterion_loss(
        "loss_giou",
        unit,
        Predictions(pred.new_zeros(1, 1, len(pred), 1), xyxy_to_cxcywh(pred)[None, None]),
        AssignedTargets(
            torch.zeros(1, 1, len(pred), dtype=torch.long),
            xyxy_to_cxcywh(target.double())[None, None],
            unit["weight"].double()[None, None],
        ),
        giou_weight=unit["loss_weight"],
    )
    unit.close("loss", loss)
    unit.close("grad_pred", torch.autograd.grad(loss, pred)[0])


def focal(unit: Unit) -> None:
    """Each term by itself (one class at a time), then the loss of the criterion.

    The reference's terms already contain the loss weight.
    """
    logits, labels = unit["logits"].clone().requires_grad_(), unit["labels"]
    num_classes = logits.shape[1]
    is_class = labels[:, None] == torch.arange(num_classes)
    loss_weight = unit["loss_weight"]
    terms = FocalLoss()(logits[..., None], (~is_class).long())
    unit.close("elementwise", terms * loss_weight)
    boxes = logits.new_zeros(1, 1, len(logits), 4)
    loss = _criterion_loss(
        "loss_cls",
        unit,
        Predictions(logits[None, None], boxes),
        AssignedTargets(labels[None, None], boxes, unit["weight"][None, None]),
        class_weight=loss_weight,
    )
    unit.close("loss", loss)
    unit.close("grad", torch.autograd.grad(loss, logits)[0])


def _criterion_loss(
    name: str, unit: Unit, predictions: Predictions, targets: AssignedTargets, **weight: float
) -> torch.Tensor:
    num_classes = predictions.logits.shape[-1]
    criterion = SetCriterion(num_classes=num_classes, classification=FocalLoss(), **weight)
    count = torch.tensor([unit["avg_factor"]])
    return criterion(predictions, targets, Geometry.of([(1, 1)], (1, 1), count.device), count)[
        name
    ][0]


def delta_coder(unit: Unit) -> None:
    """Detectron2's transform, and our decoder that clamps log sizes on both sides."""
    transform = Box2BoxTransform(weights=tuple(1 / std for std in unit["stds"]))
    anchors = unit["anchors"]
    unit.close("encoded", transform.get_deltas(anchors, unit["gts"]))
    deltas = unit["deltas"]
    decoded = decode_deltas(transform, deltas, anchors)
    below = deltas[:, 2:] < -transform.scale_clamp * torch.tensor(transform.weights[2:])
    clamped = below.any(1, keepdim=True)
    note = f"ours; Detectron2's own but for {int(clamped.sum())} rows"
    unit.close("decoded", decoded, note=note, difference=DELTA_CLAMP)
    unit.close("decoded", transform.apply_deltas(deltas, anchors), where=~clamped)
    clipped = Boxes(decoded.clone())
    clipped.clip((160, 224))
    unit.close("decoded_clipped_160x224", clipped.tensor)


def centerness_unit(unit: Unit) -> None:
    unit.close("output", centerness_target(unit["anchors"], unit["gts"]))


def roi_extractor(unit: Unit) -> None:
    """Detectron2's pooler with its usual canonical size, 224 pixels at level 4."""
    _ = unit["kind"]
    strides, rois = unit["strides"], unit["rois"]
    pooler = ROIPooler(
        output_size=7,
        scales=[1 / stride for stride in strides],
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
    )
    unit.exact("finest_scale", pooler.canonical_box_size * strides[0] // 2**pooler.canonical_level)
    # Detectron2 takes boxes image by image; the entry has them mixed.
    maps = unit["feats"]
    images = range(len(maps[0]))
    original = torch.cat([(rois[:, 0] == image).nonzero().squeeze(1) for image in images])
    boxes = [Boxes(rois[rois[:, 0] == image, 1:]) for image in images]
    levels = assign_boxes_to_levels(
        boxes,
        pooler.min_level,
        pooler.max_level,
        pooler.canonical_box_size,
        pooler.canonical_level,
    )
    back = original.argsort()
    unit.exact("levels", levels[back])
    pooled = pooler(maps, boxes)[back]
    unit.close("output_mean_hw", pooled.mean((2, 3)))
    unit.close("output_first4", pooled[:4])


def batched_nms_unit(unit: Unit) -> None:
    if unit["type"] == "soft_nms":
        check_soft_nms(unit, unit["class_ids"])
        return
    unit.exact("type", "nms")
    boxes, scores = unit["boxes"], unit["scores"]
    keep = batched_nms(boxes, scores, unit["class_ids"], unit["iou_threshold"])
    unit.exact("keep", keep)
    unit.close("dets", torch.cat([boxes, scores[:, None]], dim=1)[keep])
