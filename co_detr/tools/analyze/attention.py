"""Decoder attention: does the cross-attention fall on the objects?

It is captured while the model runs as ever.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from co_detr.errors import AnalysisError
from co_detr.layers import MultiScaleDeformableAttention
from co_detr.modeling import CoDETR
from co_detr.modeling.single_scale import ConditionalCrossAttention
from co_detr.tools.analyze.discriminability import (
    FUSED,
    NOTHING_TO_MEASURE,
    area_table,
    curve_chart,
    curve_numbers,
    examine,
    fold,
    heat_map_pictures,
    layout_of,
    score_maps,
)
from co_detr.tools.analyze.matching import match_queries
from co_detr.tools.analyze.report import Section
from co_detr.tools.analyze.subjects import Progress, Sample, Subject

ALL, MATCHED = "all queries", "matched queries"
LAST, MEAN = "last layer", "mean of layers"

_TEXT = """The score of a location is the attention that it gets in the decoder's cross-attention, \
summed over heads and queries; of deformable attention each sampled point puts its weight on the \
four cells that it is interpolated from. Scores then become maps and curves as those of the \
encoder: each level is divided by its largest score, resized to the image, and levels are \
averaged; IoF and IoB are averaged over the {images} images that have objects and background.

"All queries" are those of inference. "Matched queries" are those among them that one-to-one \
matching gives an object, one for each, as in training; they are told apart without any threshold \
on scores, which models of different training would pass differently. As the ground truth chose \
them, even those of an untrained model lie near objects, and score well above 0.5. "Mean of \
layers" is the mean of the layers' attention before levels are divided by their maximum.

Deformable attention samples few points, so that many locations have no attention at all: their \
part of the curve, at its upper right, is a straight line.

Source: Co-DETR (Zong et al., ICCV 2023), section 3.4 and figure 2, which leave open which queries \
and layers are meant."""


def attention_maps(model: CoDETR, sample: Sample) -> dict[str, Tensor]:
    """Score maps ``(H, W)`` of the decoder's attention by name of queries, layers and level.

    Raises:
        AnalysisError: if the decoder's kind of attention is not known.
    """
    images = model.preprocess([sample.input])
    memory = model.encode(images)
    layout = layout_of(sample, images, memory)
    truth = sample.input["instances"].to(model.device)
    with captured_attention(model.decoder) as captured:
        matched = match_queries(model, memory, truth).truths >= 0
    matched = torch.from_numpy(matched).to(model.device)
    maps = {}
    for name, chosen in ((ALL, torch.ones_like(matched)), (MATCHED, matched)):
        layers = [layer.maps(chosen) for layer in captured]
        mean = [torch.stack(level).mean(0) for level in zip(*layers, strict=True)]
        for key, values in ((LAST, layers[-1]), (MEAN, mean)):
            for part, scores in score_maps(values, layout).named().items():
                maps[_key(name, key, part)] = scores
        for number, values in enumerate(layers[:-1], start=1):
            maps[_key(name, f"layer {number}", FUSED)] = score_maps(values, layout).fused
    return maps


def _key(queries: str, layers: str, part: str = FUSED) -> str:
    return f"{queries}, {layers}" + ("" if part == FUSED else f", {part}")


def measure_attention(
    subjects: Sequence[Subject], samples: Sequence[Sample], progress: Progress
) -> Section:
    """IoF-IoB curves of the decoder's cross-attention (Co-DETR figure 2), one line per model."""
    examined, remarks = [], []
    for subject in subjects:
        if subject.model.decoder is None:
            remarks.append(f"{subject.name} has no decoder and is left out.")
            continue
        try:
            found = examine(
                subject.name,
                samples,
                progress,
                lambda sample, model=subject.model: attention_maps(model, sample),
                _key(ALL, LAST),
            )
        except AnalysisError as error:
            remarks.append(f"{subject.name} is left out: {error.sentence}")
            continue
        examined.append(found)
    key, title = "attention", "Decoder attention"
    if not any(result.num_images for result in examined):
        reason = NOTHING_TO_MEASURE if examined else "No model has a decoder to look at."
        return Section(key, title, "\n\n".join([reason, *remarks]), {})
    text = _TEXT.format(images=examined[0].num_images)
    return Section(
        key=key,
        title=title,
        text="\n\n".join([text, *remarks]),
        numbers=curve_numbers(examined),
        tables=tuple(
            area_table(
                f"areas-{name.split()[0]}",
                f"Area under the IoF-IoB curve of {name}, fused over levels unless one is named.",
                examined,
                prefix=f"{name}, ",
            )
            for name in (ALL, MATCHED)
        ),
        charts=tuple(
            curve_chart(
                f"{name.split()[0]}-{layers.split()[0]}",
                f"IoF-IoB curves of the attention of {name}, {layers}.",
                {result.name: result.curves[_key(name, layers)] for result in examined},
            )
            for name in (ALL, MATCHED)
            for layers in (LAST, MEAN)
        ),
        pictures=heat_map_pictures(
            f"attention of {ALL}, {LAST}, fused over levels; colors from the lowest to the "
            "highest score of each map.",
            examined,
            subjects[0].cfg.data.image_format,
        ),
    )


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
    points = locations.reshape(-1, 2) * size - 0.5  # cell centers are whole numbers
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
            known = ", ".join(adapter.__name__ for adapter in _ADAPTERS)
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
