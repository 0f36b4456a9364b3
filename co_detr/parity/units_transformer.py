"""Checks of attention, encodings and geometry of encoder and decoder."""

from __future__ import annotations

import torch

from co_detr.layers import (
    MultiScaleDeformableAttention,
    ms_deform_attn,
    ms_deform_attn_reference,
)
from co_detr.modeling.boxes import inverse_sigmoid
from co_detr.modeling.encoder import DeformableEncoder, reference_points, valid_ratio
from co_detr.modeling.position import SinePosition, encode_boxes
from co_detr.modeling.postprocess import padding_mask
from co_detr.modeling.queries.two_stage import TwoStageQueries, propose_grid
from co_detr.parity.unit import FLOAT64, Unit, level_shapes
from co_detr.structures import EncoderMemory


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
        raise ValueError(f"{unit.name} is not normalised; SinePosition always normalises.")
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
    mask = padding_mask(sizes, torch.Size((batch, 3, height, width)), torch.device("cpu"))
    memory = encoder([torch.zeros(batch, 4, *shape) for shape in shapes], mask, sizes)
    levels = memory.padding_mask.split([h * w for h, w in shapes], dim=1)
    unit.exact(
        "masks", [level.unflatten(1, shape) for level, shape in zip(levels, shapes, strict=True)]
    )


def valid_ratios_wh(unit: Unit) -> None:
    ratios = [valid_ratio(mask, torch.float32) for mask in unit["masks"]]
    unit.close("valid_ratios", torch.stack(ratios, dim=1))


def get_reference_points(unit: Unit) -> None:
    shapes = level_shapes(unit["spatial_shapes_hw"])
    unit.close("reference_points", reference_points(shapes, unit["valid_ratios"]))


def gen_encoder_output_proposals(unit: Unit) -> None:
    """Grid priors, and the projected and normalised memory of the tokens that may propose."""
    tokens, mask = unit["memory"], unit["padding_mask"]
    shapes = level_shapes(unit["spatial_shapes_hw"])
    levels = zip(mask.split([h * w for h, w in shapes], dim=1), shapes, strict=True)
    ratios = [valid_ratio(level.unflatten(1, shape), tokens.dtype) for level, shape in levels]
    memory = EncoderMemory(
        tokens, mask, shapes, torch.stack(ratios, dim=1), image_sizes=[(0, 0)] * len(tokens)
    )
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
