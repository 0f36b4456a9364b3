"""What the decoder's cross-attention looks at, captured while the model runs as ever."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from co_detr.analysis.score_maps import fold
from co_detr.errors import AnalysisError
from co_detr.layers import MultiScaleDeformableAttention
from co_detr.modeling.single_scale.attention import ConditionalCrossAttention


class Attention(Protocol):
    """What Q queries of one image attend to, of whatever kind the attention is."""

    def maps(self, queries: Tensor) -> list[Tensor]:
        """``(H_l, W_l)`` per level: attention that cells get from the chosen queries, summed.

        Args:
            queries: ``(Q,)`` bool.
        """
        ...


@dataclass(frozen=True)
class SampledAttention:
    """Deformable attention of Q queries of one image: points on L levels, and their weights.

    Attributes:
        locations: ``(Q, H, L, P, 2)`` as (x, y) in [0, 1] of their padded level.
        weights: ``(Q, H, L, P)``.
        level_shapes: (height, width) of each level.
    """

    locations: Tensor
    weights: Tensor
    level_shapes: Sequence[tuple[int, int]]

    @property
    def num_queries(self) -> int:
        return len(self.weights)

    def maps(self, queries: Tensor) -> list[Tensor]:
        """See `Attention`; the weights of heads and points are summed."""
        return [
            splat(self.locations[queries, :, level], self.weights[queries, :, level], shape)
            for level, shape in enumerate(self.level_shapes)
        ]


@dataclass(frozen=True)
class DenseAttention:
    """Standard attention of Q queries of one image to all S tokens.

    Attributes:
        weights: ``(Q, H, S)``.
        level_shapes: (height, width) of each level.
    """

    weights: Tensor
    level_shapes: Sequence[tuple[int, int]]

    def maps(self, queries: Tensor) -> list[Tensor]:
        """See `Attention`; the weights of heads are summed."""
        return fold(self.weights[queries].sum((0, 1)), self.level_shapes)


def splat(locations: Tensor, weights: Tensor, shape: tuple[int, int]) -> Tensor:
    """Puts weights on the map that they were sampled from, on the four cells around each point.

    The adjoint of bilinear sampling: a cell gets as much as its value counts for. What falls
    beside the map is lost, as it is there sampled as zero.

    Args:
        locations: ``(..., 2)`` as (x, y) in [0, 1] of the map; weights: ``(...)``.
        shape: (height, width) of the map.

    Returns:
        ``(height, width)`` in the type of the weights.
    """
    height, width = shape
    size = locations.new_tensor([width, height])
    points = locations.reshape(-1, 2) * size - 0.5  # cell centres are whole numbers
    weights = weights.reshape(-1)
    low = points.floor()
    beyond = points - low  # share of the cell to the right, or below
    total = weights.new_zeros(height * width)
    for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = low[:, 0] + right, low[:, 1] + down
        share = (beyond[:, 0] if right else 1 - beyond[:, 0]) * (
            beyond[:, 1] if down else 1 - beyond[:, 1]
        )
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        cells = (row * width + column)[inside].long()
        total.index_add_(0, cells, (share * weights)[inside])
    return total.view(height, width)


def _sampled(
    module: MultiScaleDeformableAttention, arguments: Mapping[str, object]
) -> SampledAttention:
    shapes = arguments["level_shapes"]
    locations, weights = module.sampling_points(arguments["query"], arguments["reference"], shapes)
    return SampledAttention(locations[0], weights[0], shapes)


def _conditional(
    module: ConditionalCrossAttention, arguments: Mapping[str, object]
) -> DenseAttention:
    memory = arguments["memory"]
    query, key = module.query_and_key(**arguments)
    similarity = query[0] @ key[0].transpose(-1, -2) / query.shape[-1] ** 0.5  # (H, Q, S)
    similarity = similarity.masked_fill(memory.padding_mask[0], float("-inf"))
    return DenseAttention(similarity.softmax(-1).transpose(0, 1), memory.level_shapes)


# What a call of an attention module attends to, by the module's type, from its named arguments.
_ADAPTERS: dict[type[nn.Module], Callable[[nn.Module, Mapping[str, object]], Attention]] = {
    MultiScaleDeformableAttention: _sampled,
    ConditionalCrossAttention: _conditional,
}


@contextmanager
def captured_attention(decoder: nn.Module) -> Iterator[list[Attention]]:
    """Watches the ``cross_attention`` of every layer while the decoder runs in the block.

    The decoder's outputs stay what they are, and behind the block nothing watches any more.

    Yields:
        what the first image of the batch attended to, one more entry with every call of a layer.

    Raises:
        AnalysisError: if it is not known how a layer's attention is to be read.
    """
    modules = [layer.cross_attention for layer in decoder.layers]
    for module in modules:
        if type(module) not in _ADAPTERS:
            known = ", ".join(each.__name__ for each in _ADAPTERS)
            raise AnalysisError(
                f"the attention of {type(module).__name__} cannot be read, only that of {known}: "
                "leave the measure of the decoder's attention out for this model."
            )
    captured: list[Attention] = []

    def watch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        with torch.no_grad():
            captured.append(_ADAPTERS[type(module)](module, arguments))

    handles = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in modules]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
