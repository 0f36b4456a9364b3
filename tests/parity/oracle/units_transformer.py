"""Checks of single functions: attention, encodings, geometry, and what only Co-DINO has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from co_detr.layers import (
    MultiScaleDeformableAttention,
    ms_deform_attn,
    ms_deform_attn_reference,
)
from co_detr.modeling import QualityFocalLoss, ReferencePosition, SetCriterion, SoftNMSPostprocessor
from co_detr.modeling.geometry import Geometry, Levels, SinePosition, encode_boxes, valid_ratio
from co_detr.modeling.losses import normalize_boxes
from co_detr.modeling.queries import DenoisingQueries
from co_detr.modeling.queries.sources import TwoStageQueries, propose_grid
from co_detr.modeling.transformer import DeformableEncoder, inverse_sigmoid
from co_detr.structures import (
    AssignedTargets,
    EncoderMemory,
    GroundTruth,
    Predictions,
    QueryGroup,
)
from tests.parity.oracle.eval_mode import check_decoder, check_denoising
from tests.parity.oracle.model import build_decoder
from tests.parity.oracle.report import FLOAT64, Unit, level_shapes
from tests.parity.oracle.training import recorded_noise


def ms_deform_attn_function(unit: Unit) -> None:
    """The compiled operator (where it is built) and the PyTorch one, each with its gradients."""
    shapes = level_shapes(unit["spatial_shapes_hw"])
    names = ("value", "sampling_locations", "attention_weights")
    originals = {name: unit[name] for name in names}
    grad_output = unit["grad_output"]
    for operator in (ms_deform_attn, ms_deform_attn_reference):
        note = operator.__name__
        inputs = {name: value.clone().requires_grad_() for name, value in originals.items()}
        output = operator(
            inputs["value"], shapes, inputs["sampling_locations"], inputs["attention_weights"]
        )
        unit.close("output", output, FLOAT64, note=note)
        gradients = torch.autograd.grad(output, list(inputs.values()), grad_output)
        for name, gradient in zip(names, gradients, strict=True):
            unit.close(f"grad_{name}", gradient, FLOAT64, note=note)


def ms_deform_attn_module(unit: Unit) -> None:
    """The reference is sequence-first, adds the position itself and adds the residual."""
    reference = unit["reference_points"]
    query = unit["query"].clone().requires_grad_()
    value = unit["value"].clone().requires_grad_()
    module = MultiScaleDeformableAttention(
        query.shape[-1], unit["num_heads"], reference.shape[2], unit["num_points"]
    ).to(query.dtype)
    module.load_state_dict(unit["state_dict"])
    attended = module(
        (query + unit["query_pos"]).transpose(0, 1),
        value.transpose(0, 1),
        reference,
        level_shapes(unit["spatial_shapes_hw"]),
        unit["key_padding_mask"],
    )
    output = query + attended.transpose(0, 1)
    unit.close("output", output, FLOAT64)
    output.backward(unit["grad_output"])
    unit.close("grad_query", query.grad, FLOAT64)
    unit.close("grad_value", value.grad, FLOAT64)
    unit.close("grad_sampling_offsets_weight", module.sampling_offsets.weight.grad, FLOAT64)


def ms_deform_attn_init(unit: Unit) -> None:
    module = MultiScaleDeformableAttention(
        unit["embed_dims"], unit["num_heads"], unit["num_levels"], unit["num_points"]
    )
    weights = module.attention_weights
    unit.close("sampling_offsets_bias", module.sampling_offsets.bias)
    unit.exact("sampling_offsets_weight_absmax", module.sampling_offsets.weight.abs().max().item())
    unit.exact(
        "attention_weights_absmax",
        max(weights.weight.abs().max().item(), weights.bias.abs().max().item()),
    )


def sine_pe(unit: Unit) -> None:
    """Both of the reference's settings; an entry names what differs from its class's defaults."""
    kind = unit["kind"]
    if not unit["normalize"]:
        raise ValueError(f"{unit.name} is not normalized; SinePosition always normalizes.")
    temperature = unit["temperature"] if unit.has("temperature") else 10000
    offset = unit["offset"] if unit.has("offset") else {"dino": 0.0}[kind]
    encoding = SinePosition(2 * unit["num_feats"], temperature, offset)
    unit.close("output", encoding(unit["mask"]))


def mask_resize(unit: Unit) -> None:
    """Read from the memory of an encoder without layers, which resizes masks on its way in."""
    height, width = unit["padded_hw"]
    sizes = level_shapes(unit["image_sizes_hw"])
    shapes = level_shapes(unit["featmap_sizes_hw"])
    batch = len(sizes)
    encoder = DeformableEncoder(
        position_encoding=SinePosition(4), num_layers=0, embed_dim=4, num_levels=len(shapes)
    )
    geometry = Geometry.of(sizes, (height, width), torch.device("cpu"))
    memory = encoder([torch.zeros(batch, 4, *shape) for shape in shapes], geometry)
    unit.exact("masks", memory.levels.masks())


def valid_ratios_wh(unit: Unit) -> None:
    ratios = [valid_ratio(mask, torch.float32) for mask in unit["masks"]]
    unit.close("valid_ratios", torch.stack(ratios, dim=1))


def get_reference_points(unit: Unit) -> None:
    shapes = level_shapes(unit["spatial_shapes_hw"])
    levels = _levels(shapes, torch.zeros(0), unit["valid_ratios"])
    unit.close("reference_points", levels.reference_points())


def gen_encoder_output_proposals(unit: Unit) -> None:
    """Grid priors, and the projected and normalized memory of the tokens that may propose."""
    tokens, mask = unit["memory"], unit["padding_mask"]
    shapes = level_shapes(unit["spatial_shapes_hw"])
    levels = zip(mask.split([h * w for h, w in shapes], dim=1), shapes, strict=True)
    ratios = [valid_ratio(level.unflatten(1, shape), tokens.dtype) for level, shape in levels]
    memory = EncoderMemory(tokens, _levels(shapes, mask, torch.stack(ratios, dim=1)))
    source = TwoStageQueries(num_queries=1, num_classes=1, embed_dim=tokens.shape[-1])
    for module, prefix in (
        (source.memory_proj, "enc_output"),
        (source.memory_norm, "enc_output_norm"),
    ):
        module.load_state_dict({name: unit[f"{prefix}_{name}"] for name in ("weight", "bias")})
    usable, grid_logits = propose_grid(memory)
    unit.close("output_memory", source.memory_norm(source.memory_proj(usable)))
    unit.close("output_proposals_unact", grid_logits)


def get_proposal_pos_embed(unit: Unit) -> None:
    reference = unit["proposals_unact"].sigmoid()
    unit.close("output", encode_boxes(reference, unit["embed_dims"] // 2))


def inverse_sigmoid_unit(unit: Unit) -> None:
    x = unit["x"]
    for key, eps in (("eps_1e_5", 1e-5), ("eps_1e_3", 1e-3)):
        unit.close(key, inverse_sigmoid(x, eps))


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
        Geometry.of([(1, 1)], (1, 1), logits.device),
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
    shapes, sizes = (level_shapes(unit[key]) for key in ("spatial_shapes_hw", "image_sizes_hw"))
    levels = _levels(shapes, unit["padding_mask"], unit["valid_ratios"], sizes)
    memory = EncoderMemory(unit["memory"], levels)
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
    factors = Geometry.of(sizes, (1, 1), weights.device).factors
    truth = [
        GroundTruth(labels, normalize_boxes(boxes, factor), factor)
        for labels, boxes, factor in zip(
            unit["gt_labels"], unit["gt_boxes_xyxy"], factors, strict=True
        )
    ]
    num_gts = [len(objects.labels) for objects in truth]
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
    levels = _levels([], torch.zeros(batch, 0, dtype=torch.bool), torch.ones(batch, 0, 2))
    return EncoderMemory(torch.zeros(batch, 0, channels), levels)


def _levels(
    shapes: list[tuple[int, int]],
    mask: Tensor,
    ratios: Tensor,
    image_sizes: Sequence[tuple[int, int]] = (),
) -> Levels:
    """Recorded ones; of images of one pixel, where nothing reads their sizes."""
    sizes = image_sizes or [(1, 1)] * len(ratios)
    return Levels(Geometry.of(sizes, (1, 1), ratios.device), shapes, mask, ratios)


def _matched_queries(batch: int, number: int, channels: int) -> QueryGroup:
    """The group that denoising queries see; only its name and size matter."""
    content, reference = torch.zeros(batch, number, channels), torch.zeros(batch, number, 4)
    return QueryGroup("matching", content, None, reference)
