"""Checks of box losses, box codes, pooling and suppression."""

from __future__ import annotations

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou

from co_detr.modeling.auxiliary.box_codes import decode_deltas
from co_detr.modeling.auxiliary.dense import centreness_target
from co_detr.modeling.boxes import generalised_iou, xyxy_to_cxcywh
from co_detr.modeling.criterion import FocalLoss, SetCriterion
from co_detr.parity.differences import DELTA_CLAMP
from co_detr.parity.unit import Unit
from co_detr.parity.units_dino import check_soft_nms
from co_detr.structures import AssignedTargets, Predictions


def giou(unit: Unit) -> None:
    """The overlap itself, then the loss of the criterion.

    The criterion takes normalised cxcywh boxes; here the image has one pixel, and float64 makes
    the way there and back exact.
    """
    originals, target = unit["pred"], unit["target"]
    unit.close("giou_aligned", generalised_iou(originals, target))
    unit.close("iou_aligned", matched_pairwise_iou(Boxes(originals), Boxes(target)))
    rows = len(unit.expected("giou_pairwise"))
    unit.close("giou_pairwise", generalised_iou(originals[:rows, None], target[None]))
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
    return criterion(predictions, targets, [(1, 1)], count)[name][0]


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


def centerness_target(unit: Unit) -> None:
    unit.close("output", centreness_target(unit["anchors"], unit["gts"]))


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
