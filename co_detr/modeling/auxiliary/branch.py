"""The auxiliary branch: pyramids from the encoder, heads on them, and their positive queries."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from co_detr.errors import ConfigError
from co_detr.modeling.detectors import CascadeDetector, MergedDetector
from co_detr.modeling.queries.positive import PositiveQueries
from co_detr.structures import AuxiliaryOutput, EncoderMemory, HeadCounts, QueryGroup, StepCounts


@dataclass(frozen=True)
class AuxiliaryBranch:
    """What the auxiliary part adds to one training step: outputs by head, and query groups."""

    outputs: dict[str, AuxiliaryOutput]
    groups: list[QueryGroup]


# Configs that earlier versions saved do not have these nodes.
_MERGED, _CASCADE = MergedDetector(), CascadeDetector()


class HybridAssignmentHeads(nn.Module):
    """K one-to-many heads on the encoder output (Co-DETR section 3.2 and 3.3).

    A head is any module with ``forward(images, features, gt_instances) -> AuxiliaryOutput`` and
    ``detect(images, features) -> HeadDetections``. One that learns masks also has
    ``reads_masks`` and ``ignore_masks``, see `FasterRCNNHead`. One whose losses are divided by
    counts also has ``count(images, features, gt_instances) -> HeadCounts`` and takes these of all
    micro-batches of a step, joined, as a fourth argument; ``counts_without_features`` if it needs
    none for that. The losses of a head that does not count are taken for means over images. Heads
    are keyword arguments: their names become prefixes of losses and paths of config overrides
    (``model.auxiliary.atss...``). One that is None is left out, so that an override can switch it
    off (``model.auxiliary.atss=null``).

    Args:
        pyramid: adapter from ``EncoderMemory`` to the maps that heads read.
        positive_queries: one query source that is copied, with new weights, for every head;
            None trains the heads without customized queries.
        num_decoder_layers, lambda_2: the losses of the heads are multiplied by their product.
            The reference bakes it into each head's weights (6 layers x 2.0 = 12), to balance the
            sum over decoder layers on the other side.
        train_encoder: False keeps the gradients of the heads, and of the features that positive
            queries take from them, away from the encoder. Then the heads learn, so that what they
            assign is as usual, but the model learns from their positive queries alone: an
            ablation (with ``lambda_2=0`` the RPN would propose nothing, and the positives would
            be the ground truths).
        merged, cascade: what the heads and the decoder detect together; None: not at all.

    Raises:
        ConfigError: without any head (the plain DETR is ``model.auxiliary = None``).
    """

    def __init__(
        self,
        *,
        pyramid: nn.Module,
        positive_queries: PositiveQueries | None,
        num_decoder_layers: int,
        lambda_2: float = 2.0,
        train_encoder: bool = True,
        merged: MergedDetector | None = _MERGED,
        cascade: CascadeDetector | None = _CASCADE,
        **heads: nn.Module | None,
    ):
        super().__init__()
        present = {name: head for name, head in heads.items() if head is not None}
        if not present:
            raise ConfigError(
                "HybridAssignmentHeads needs a head; for none at all set model.auxiliary=null."
            )
        self.pyramid = pyramid
        self.train_encoder = train_encoder
        self.heads = nn.ModuleDict(present)
        self.loss_weight = num_decoder_layers * lambda_2
        self.merged = merged
        self.cascade = cascade
        self.positive_queries = nn.ModuleDict()
        if positive_queries is not None:
            for name in present:
                source = copy.deepcopy(positive_queries)
                source.reset_parameters()  # a copy alone would start all heads alike
                self.positive_queries[name] = source

    @classmethod
    def head_names(cls, node: Mapping[str, Any]) -> list[str]:
        """Names of the heads in a config of this class: what is none of its own arguments."""
        own = {*inspect.signature(cls).parameters, "_target_"}
        return [name for name in node if name not in own and node[name] is not None]

    @property
    def reads_masks(self) -> bool:
        """Whether ``gt_masks`` are read, where the ground truth has them."""
        return any(reads_masks_of(head) for head in self.heads.values())

    def ignore_masks(self) -> None:
        """Lets heads that learn masks do without them, for data that have none."""
        for head in self.heads.values():
            if reads_masks_of(head):
                head.ignore_masks()

    def count_without_memory(
        self, images: ImageList, gt_instances: list[Instances]
    ) -> dict[str, HeadCounts]:
        """What those heads find in this batch that need no features to count."""
        return {
            name: head.count(images, None, gt_instances)
            for name, head in self.heads.items()
            if _counts_without_features(head)
        }

    @property
    def counts_need_memory(self) -> bool:
        """Whether a head counts that `count_without_memory` leaves out."""
        return any(map(_counts_features, self.heads.values()))

    @torch.no_grad()
    def count(
        self, images: ImageList, memory: EncoderMemory, gt_instances: list[Instances]
    ) -> dict[str, HeadCounts]:
        """What those heads find in this batch that need features to count.

        `forward` finds the same in the same memory: it is how many samples there are that counts,
        not which of them are drawn.
        """
        features = self.pyramid(memory)
        return {
            name: head.count(images, features, gt_instances)
            for name, head in self.heads.items()
            if _counts_features(head)
        }

    def forward(
        self,
        images: ImageList,
        memory: EncoderMemory,
        gt_instances: list[Instances],
        counts: StepCounts | None = None,
    ) -> AuxiliaryBranch:
        """Runs every head on its copy of the ground truth.

        Args:
            images: the network input; heads read its sizes.
            memory: encoder output.
            gt_instances: with ``gt_boxes`` (absolute), ``gt_classes`` and, if a head reads them,
                ``gt_masks``.
            counts: of all micro-batches of the step, to whose losses those of this one are then a
                contribution; None: this batch is all of it.
        """
        if not self.train_encoder:
            memory = replace(memory, tokens=memory.tokens.detach())
        features = self.pyramid(memory)
        outputs, groups = {}, []
        for name, head in self.heads.items():
            weight = self.loss_weight
            totals = None if counts is None else counts.heads.get(name)
            if totals is None:
                output = head(images, features, gt_instances)
                weight *= 1 if counts is None else counts.share(len(gt_instances))
            else:
                output = head(images, features, gt_instances, totals)
            losses = {key: value * weight for key, value in output.losses.items()}
            outputs[name] = AuxiliaryOutput(losses, output.candidates)
            if name in self.positive_queries:
                source = self.positive_queries[name]
                positives = None if totals is None else totals.positives
                group = source(
                    f"{name}_queries", output.candidates, memory.levels.images, positives
                )
                groups.append(group)
        return AuxiliaryBranch(outputs, groups)


def _counts_without_features(head: nn.Module) -> bool:
    return getattr(head, "counts_without_features", False)


def _counts_features(head: nn.Module) -> bool:
    return hasattr(head, "count") and not _counts_without_features(head)


def reads_masks_of(head: nn.Module) -> bool:
    """Whether a head learns masks, and predicts them; heads that cannot need not say so."""
    return getattr(head, "reads_masks", False)


class ExtraLevel(nn.Module):
    """Adapter of multi-scale encoders: all levels as they are, plus one at half resolution.

    The extra level is a stride-2 3x3 convolution and GroupNorm of the coarsest encoder level.
    Source: Co-DETR section 3.2 ("multi-scale adapter"); ``downsample`` of the reference.

    Args:
        finest: log2 of the stride of the encoder's finest level; names the maps p<log2 stride>.
    """

    def __init__(self, *, embed_dim: int, finest: int = 3, num_groups: int = 32):
        super().__init__()
        self.finest = finest
        self.conv = normed_conv(embed_dim, num_groups, stride=2)

    def forward(self, memory: EncoderMemory) -> dict[str, Tensor]:
        """Encoder memory -> maps ``(B, C, H, W)`` by name, finest first."""
        maps = memory.maps()
        maps.append(self.conv(maps[-1]))
        return {f"p{self.finest + level}": level_map for level, level_map in enumerate(maps)}


def normed_conv(embed_dim: int, num_groups: int, stride: int = 1) -> Conv2d:
    """3x3 convolution and GroupNorm, ``(B, C, H, W)`` -> ``(B, C, H/stride, W/stride)``."""
    norm = nn.GroupNorm(num_groups, embed_dim)
    return Conv2d(embed_dim, embed_dim, 3, stride=stride, padding=1, norm=norm)


class SimplePyramid(nn.Module):
    """Adapter of single-scale encoders: level after level, away from the encoder's map.

    The level of the encoder's stride is its map as it is. Each finer level is the one before it at
    twice the size (bilinear), each coarser one at half (stride 2), through a 3x3 convolution and
    GroupNorm. Where a side is odd, a coarser level rounds up, as the backbone does.
    Source: Co-DETR section 3.2 ("multi-scale adapter"), which has ViTDet's simple feature pyramid
    in mind but interpolation instead of transposed convolutions, and each level from the one
    before it. The norm, which it does not mention, is that of the multi-scale adapter.

    Args:
        stride: of the encoder's map in pixels, a power of two.
        strides: of the levels, finest first, each twice the one before; one of them is ``stride``.

    Raises:
        ConfigError: for other strides.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        strides: Sequence[int],
        stride: int = 32,
        num_groups: int = 32,
    ):
        super().__init__()
        strides = list(strides)
        doubled = [strides[0] * 2**level for level in range(len(strides))]
        if stride not in strides or strides != doubled or stride & (stride - 1):
            raise ConfigError(
                f"model.auxiliary.pyramid.strides={strides} must double from level to level and "
                f"contain the encoder's stride {stride}, as [8, 16, 32, 64] does for 32."
            )
        self.names = [f"p{stride.bit_length() - 1}" for stride in strides]
        start = strides.index(stride)

        def convs(number: int, stride: int) -> nn.ModuleList:
            return nn.ModuleList(
                [normed_conv(embed_dim, num_groups, stride) for _ in range(number)]
            )

        self.finer = convs(start, 1)  # from the encoder's map outwards
        self.coarser = convs(len(strides) - start - 1, 2)

    def forward(self, memory: EncoderMemory) -> dict[str, Tensor]:
        """Encoder memory of one level -> maps ``(B, C, H, W)`` by name, finest first.

        Raises:
            ConfigError: if the memory has several levels.
        """
        if len(memory.level_shapes) != 1:
            raise ConfigError(
                f"SimplePyramid reads an encoder of one level, this has {len(memory.level_shapes)}:"
                " take ExtraLevel as model.auxiliary.pyramid."
            )
        (map_,) = memory.maps()
        levels = [map_]
        for conv in self.finer:
            doubled = F.interpolate(levels[0], scale_factor=2, mode="bilinear", align_corners=False)
            levels.insert(0, conv(doubled))
        for conv in self.coarser:
            levels.append(conv(levels[-1]))
        return dict(zip(self.names, levels, strict=True))
