"""Parameters, FLOPs and activations of a detector, part by part.

fvcore traces one forward pass and counts it; this file adds handlers for the operators that fvcore
does not know and sums up by part. As in fvcore, one multiply-add is one FLOP, and activations are
the elements that convolutions, linear layers, matrix products and attention put out.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from detectron2.utils.events import EventStorage
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis, parameter_count
from fvcore.nn.jit_analysis import JitModelAnalysis
from fvcore.nn.jit_handles import generic_activation_jit, get_shape
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from co_detr.modeling import CoDETR

# Parts in the order of the computation: module paths of the model, and what to leave out of them.
PARTS = (
    ("backbone", ("backbone",), ("backbone.lateral_convs", "backbone.extra_convs")),
    ("neck", ("backbone.lateral_convs", "backbone.extra_convs"), ()),
    ("encoder", ("encoder",), ()),
    ("query selection", ("queries",), ()),
    ("decoder", ("decoder",), ("decoder.class_heads", "decoder.box_heads")),
    ("heads", ("decoder.class_heads", "decoder.box_heads"), ()),
    ("mask head", ("mask_head",), ()),
)


@dataclass(frozen=True)
class PartCost:
    """Cost of one part: parameters, multiply-adds and activation elements of a forward pass."""

    name: str
    parameters: int
    flops: int
    activations: int


@dataclass(frozen=True)
class Complexity:
    """Cost of one forward pass.

    Attributes:
        parts: all parts; their sums are the totals of the model.
        uncounted: operators that no handler counts, with the number of calls: elementwise work,
            copies, index arithmetic, and pooling of regions.
    """

    parts: list[PartCost]
    uncounted: dict[str, int]

    @property
    def total(self) -> PartCost:
        return self._sum("total", self.parts)

    @property
    def auxiliary(self) -> PartCost:
        """The parts that only training needs."""
        chosen = [part for part in self.parts if part.name.startswith("auxiliary")]
        return self._sum("auxiliary parts", chosen)

    @staticmethod
    def _sum(name: str, parts: list[PartCost]) -> PartCost:
        return PartCost(
            name,
            sum(part.parameters for part in parts),
            sum(part.flops for part in parts),
            sum(part.activations for part in parts),
        )


@torch.no_grad()
def analyze(model: CoDETR, batched_inputs: list[dict]) -> Complexity:
    """Counts one forward pass in the mode that the model is in.

    In training mode that is the forward pass up to the losses; the backward pass costs about
    twice as much. All random draws are the same whatever was drawn before.

    Args:
        model: on the CPU.
        batched_inputs: as for the model; with ``instances`` in training mode.
    """
    traceable = _Traceable(model, batched_inputs)
    images = tuple(entry["image"] for entry in batched_inputs)
    flops = _quiet(FlopCountAnalysis(traceable, images))
    flops.set_op_handle(**FLOP_HANDLERS)
    activations = _quiet(ActivationCountAnalysis(traceable, images))
    activations.set_op_handle(**ACTIVATION_HANDLERS)
    parts = _parts(model, flops.by_module(), activations.by_module())
    return Complexity(parts, dict(flops.unsupported_ops().most_common()))


class _Traceable(nn.Module):
    """``model`` as a function from image tensors to a tuple of tensors."""

    def __init__(self, model: CoDETR, batched_inputs: list[dict]):
        super().__init__()
        self.model = model
        self.train(model.training)
        self.others = batched_inputs

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        batch = [
            {**others, "image": image} for others, image in zip(self.others, images, strict=True)
        ]
        with EventStorage(), _PlainSizes(), _as_if_not_traced():
            outputs = self.model(batch)
        if self.training:
            return tuple(outputs.values())
        # All that is predicted: what nothing comes of is not traced.
        found = []
        for output in outputs:
            instances = output["instances"]
            found += [instances.pred_boxes.tensor, instances.scores]
            if instances.has("pred_masks"):
                found.append(instances.pred_masks.probabilities)
            if instances.has("mask_scores"):
                found.append(instances.mask_scores)
        return tuple(found)


@contextlib.contextmanager
def _as_if_not_traced() -> Iterator[None]:
    """Detectron2 and torchvision compute differently while they are traced for export."""
    with (
        mock.patch.object(torch.jit, "is_tracing", return_value=False),
        mock.patch.object(torch.jit._trace, "is_tracing", return_value=False),
    ):
        yield


class _PlainSizes(TorchFunctionMode):
    """Gives sizes as integers: tracing makes them tensors, which no operator takes in a list."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.size and isinstance(result, Tensor):
            return int(result)
        if function in (torch.Tensor.shape.__get__, torch.Tensor.size):
            return torch.Size(int(size) for size in result)
        return result


def _quiet(analysis: JitModelAnalysis) -> JitModelAnalysis:
    """The report lists the uncounted operators itself; that modules are unused is the point."""
    return (
        analysis.unsupported_ops_warnings(False)
        .uncalled_modules_warnings(False)
        .tracer_warnings("none")
    )


def _parts(model: CoDETR, flops: Counter[str], activations: Counter[str]) -> list[PartCost]:
    parameters = parameter_count(model)

    def cost(name: str, paths: tuple[str, ...], without: tuple[str, ...] = ()) -> PartCost:
        def total(counts: Counter[str], prefix: str) -> int:
            chosen = sum(counts.get(prefix + path, 0) for path in paths)
            return int(chosen - sum(counts.get(prefix + path, 0) for path in without))

        return PartCost(
            name, total(parameters, ""), total(flops, "model."), total(activations, "model.")
        )

    parts = [cost(*part) for part in PARTS]
    if model.auxiliary is not None:
        heads, queries = model.auxiliary.heads, model.auxiliary.positive_queries
        for name in heads:
            parts.append(cost(f"auxiliary head: {name}", (f"auxiliary.heads.{name}",)))
        for name in queries:
            paths = (f"auxiliary.positive_queries.{name}",)
            parts.append(cost(f"auxiliary queries: {name}", paths))
        known = ("auxiliary.heads", "auxiliary.positive_queries")
        parts.append(cost("auxiliary pyramid", ("auxiliary",), known))
    rest = PartCost(
        "rest",
        parameters[""] - sum(part.parameters for part in parts),
        int(flops[""]) - sum(part.flops for part in parts),
        int(activations[""]) - sum(part.activations for part in parts),
    )
    # A backbone may have no neck, and a model no parameters outside of its parts.
    return [part for part in [*parts, rest] if part.parameters or part.flops]


def _ms_deform_attn_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Four corners times D channels for every sampling point."""
    _, _, _, channels = get_shape(inputs[0])
    points = math.prod(get_shape(inputs[3]))  # attention weights (B, Q, H, L, P)
    return points * 4 * channels


def _dot_product_attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Scores and weighted sum of ``(..., Q, D)`` queries and ``(..., K, D)`` keys, mask or not."""
    *leading, queries, channels = get_shape(inputs[0])
    keys, value_channels = get_shape(inputs[2])[-2:]
    return math.prod(leading) * queries * keys * (channels + value_channels)


FLOP_HANDLERS = {
    "co_detr::ms_deform_attn": _ms_deform_attn_flops,
    "aten::scaled_dot_product_attention": _dot_product_attention_flops,
}
ACTIVATION_HANDLERS = {name: generic_activation_jit("attention") for name in FLOP_HANDLERS}
