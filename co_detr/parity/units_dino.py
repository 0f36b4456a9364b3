"""Checks of what only Co-DINO has."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from co_detr.modeling import QualityFocalLoss, ReferencePosition, SetCriterion, SoftNMSPostprocessor
from co_detr.modeling.boxes import normalise_boxes
from co_detr.modeling.queries import DenoisingQueries
from co_detr.parity.build import build_decoder
from co_detr.parity.denoising import check_denoising
from co_detr.parity.eval_mode import check_decoder
from co_detr.parity.noise import recorded_noise
from co_detr.parity.unit import Unit, level_shapes
from co_detr.structures import (
    AssignedTargets,
    EncoderMemory,
    GroundTruth,
    Predictions,
    QueryGroup,
)

MIN_SCORE = 1e-3  # the default of mmcv's soft-NMS, where an entry names none


def sine_of_boxes(unit: Unit) -> None:
    """The code that enters the perceptron of the positional queries."""
    position = ReferencePosition(2 * unit["pos_feat"])
    boxes = unit["pos"].transpose(0, 1)  # query-major in the reference
    codes: list[Tensor] = []
    position.layers[0].register_forward_pre_hook(lambda _module, inputs: codes.append(inputs[0]))
    position(boxes)
    unit.close("output", codes[0].transpose(0, 1))


def quality_focal_loss(unit: Unit) -> None:
    """Each row by itself, then the loss of the criterion, which computes the IoU itself.

    There, predictions are cut from the target's box so that their IoU is the given quality.
    """
    logits, labels, quality = unit["logits"], unit["labels"], unit["scores"]
    unit.close("per_row", QualityFocalLoss()(logits, labels, quality))
    logits = logits.double().requires_grad_()
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0], dtype=torch.float64).expand(len(labels), 4)
    part = whole.clone()
    part[:, 2] = quality.double()
    criterion = SetCriterion(
        num_classes=logits.shape[1], classification=QualityFocalLoss(), class_weight=1.0
    )
    losses = criterion(
        Predictions(logits[None, None], part[None, None]),
        AssignedTargets(labels[None, None], whole[None, None], unit["weight"].double()[None, None]),
        [(1, 1)],
        torch.tensor([unit["avg_factor"]]),
    )
    loss = losses["loss_cls"][0]
    unit.close("loss", loss)
    unit.close("grad", torch.autograd.grad(loss, logits)[0])


def soft_nms_unit(unit: Unit) -> None:
    """One class, linear or Gaussian."""
    method, sigma = unit["method"], unit["sigma"]
    if method not in ("linear", "gaussian"):
        raise ValueError(f"{unit.name} is {method} soft-NMS; ours is linear or gaussian.")
    classes = torch.zeros(len(unit["scores"]), dtype=torch.long)
    check_soft_nms(unit, classes, sigma if method == "gaussian" else None)


def check_soft_nms(unit: Unit, classes: Tensor, sigma: float | None = None) -> None:
    """``dets`` and ``keep`` of boxes of these classes."""
    boxes, scores = unit["boxes"], unit["scores"]
    postprocessor = SoftNMSPostprocessor(
        max_detections=len(boxes),
        iou_threshold=unit["iou_threshold"],
        min_score=unit["min_score"] if unit.has("min_score") else MIN_SCORE,
        sigma=sigma,
    )
    found = Instances(
        (1, 1),
        pred_boxes=Boxes(boxes),
        scores=scores,
        pred_classes=classes,
        place=torch.arange(len(boxes)),
    )
    kept = postprocessor.thin_out(found)
    unit.exact("keep", kept.place)
    unit.close("dets", torch.cat([kept.pred_boxes.tensor, kept.scores[:, None]], dim=1))


def decoder(unit: Unit) -> None:
    """The first layers of a case's decoder for one image, from its recorded encoder output."""
    weights = unit["state_dict"]
    model = build_decoder(weights, unit["num_classes"], len(unit.expected("cls_logits")))
    memory = EncoderMemory(
        tokens=unit["memory"],
        padding_mask=unit["padding_mask"],
        level_shapes=level_shapes(unit["spatial_shapes_hw"]),
        valid_ratios=unit["valid_ratios"],
        image_sizes=level_shapes(unit["image_sizes_hw"]),
    )
    unit.report.dropped += tuple(f"{unit.name}.{entry}" for entry in unit["dropped"])
    with torch.no_grad():
        check_decoder(unit.report, unit.name, model, memory)


def denoising_queries(unit: Unit) -> None:
    """Noised labels and boxes from recorded draws, and the mask together with matched queries."""
    weights, sizes = unit["label_embedding"], [tuple(size) for size in unit["image_sizes_hw"]]
    source = DenoisingQueries(
        num_classes=unit["num_classes"],
        embed_dim=weights.shape[1],
        num_queries=unit["num_dn_queries"],
        label_noise=unit["label_noise"],
        box_noise=unit["box_noise"],
    )
    source.load_state_dict({"label_embedding.weight": weights})
    truth = [
        GroundTruth(labels, normalise_boxes(boxes, size), size)
        for labels, boxes, size in zip(unit["gt_labels"], unit["gt_boxes_xyxy"], sizes, strict=True)
    ]
    num_gts = [len(each.labels) for each in truth]
    embedded: list[Tensor] = []
    source.label_embedding.register_forward_pre_hook(
        lambda _module, inputs: embedded.append(inputs[0])
    )
    with torch.no_grad(), recorded_noise(source, unit["raw_draws"], num_gts):
        group = source(_empty_memory(len(sizes), weights.shape[1]), truth)
    matching = _matched_queries(len(sizes), unit["num_queries"], weights.shape[1])
    check_denoising(unit.report, unit.name, [matching, group], embedded[0], num_gts)
    unit.exact("pad_size", group.num_queries)
    unit.exact("num_dn_group", group.num_blocks)


def _empty_memory(batch: int, channels: int) -> EncoderMemory:
    return EncoderMemory(
        tokens=torch.zeros(batch, 0, channels),
        padding_mask=torch.zeros(batch, 0, dtype=torch.bool),
        level_shapes=[],
        valid_ratios=torch.ones(batch, 0, 2),
        image_sizes=[(1, 1)] * batch,
    )


def _matched_queries(batch: int, number: int, channels: int) -> QueryGroup:
    """The group that denoising queries see; only its name and size matter."""
    content, reference = torch.zeros(batch, number, channels), torch.zeros(batch, number, 4)
    return QueryGroup("matching", content, None, reference)
