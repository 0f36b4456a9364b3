"""ResNet with what Detectron2's lacks, and the channel mapper on it and other backbones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling import backbone as detectron2_backbones
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from co_detr.errors import ConfigError

BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class ResNet(detectron2_backbones.ResNet):
    """Detectron2's ResNet without its classifier, with activation checkpointing.

    Args:
        stem, stages, out_features, freeze_at: see the parent.
        activation_checkpointing: in training, keep only the input of every block that learns and
            compute the block again in the backward pass.

    Raises:
        ConfigError: if batch norms that gather statistics would count every batch twice.
    """

    def __init__(
        self,
        stem: CNNBlockBase,
        stages: list[list[CNNBlockBase]],
        out_features: Sequence[str],
        freeze_at: int = 0,
        activation_checkpointing: bool = False,
    ):
        super().__init__(stem, stages, out_features=out_features, freeze_at=freeze_at)
        self.activation_checkpointing = activation_checkpointing
        if activation_checkpointing and any(isinstance(m, _BatchNorm) for m in self.modules()):
            raise ConfigError(
                "activation_checkpointing of a ResNet would count every batch twice in the "
                "statistics of its batch norms: build it with norm=FrozenBN or norm=GN."
            )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``(B, 3, H, W)`` -> maps ``(B, C, H / stride, W / stride)`` by name."""
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return super().forward(images)
        maps = {"stem": self.stem(images)}
        x = maps["stem"]
        for name, stage in zip(self.stage_names, self.stages, strict=True):
            for block in stage:
                x = checkpoint(block, x, use_reentrant=False) if _learns(block) else block(x)
            maps[name] = x
        return {name: maps[name] for name in maps if name in self._out_features}


def _learns(block: nn.Module) -> bool:
    """A frozen block keeps nothing for the backward pass anyway."""
    return any(parameter.requires_grad for parameter in block.parameters())


def resnet_stages(
    *,
    depth: int,
    stem_channels: int,
    res2_channels: int,
    norm: str | type = "FrozenBN",
    stride_in_1x1: bool = False,
) -> list[list[CNNBlockBase]]:
    """The four residual stages, each twice as wide as the one before.

    Args:
        depth: 18, 34 (basic blocks), 50, 101 or 152 (bottleneck blocks).
        stem_channels: output of the stem.
        res2_channels: output of the first stage; 256 in the usual ResNet-50, 64 in ResNet-18.
        stride_in_1x1: where bottleneck blocks of MSRA's variant have their stride.

    Raises:
        ConfigError: for another depth.
    """
    if depth not in BLOCKS_PER_STAGE:
        raise ConfigError(f"ResNet depth must be one of {sorted(BLOCKS_PER_STAGE)}, got {depth}.")
    stages, in_channels = [], stem_channels
    for index, num_blocks in enumerate(BLOCKS_PER_STAGE[depth]):
        out_channels = res2_channels * 2**index
        kwargs = {"in_channels": in_channels, "out_channels": out_channels, "norm": norm}
        if depth >= 50:
            kwargs |= {"bottleneck_channels": out_channels // 4, "stride_in_1x1": stride_in_1x1}
        stages.append(
            ResNet.make_stage(
                block_class=BottleneckBlock if depth >= 50 else BasicBlock,
                num_blocks=num_blocks,
                stride_per_block=[1 if index == 0 else 2] + [1] * (num_blocks - 1),
                **kwargs,
            )
        )
        in_channels = out_channels
    return stages


class ChannelMapper(Backbone):
    """Wraps any Detectron2 backbone, as ``FPN`` does, without a top-down path.

    Every chosen map gets a 1x1 convolution and GroupNorm. Extra levels are stride-2 3x3
    convolutions; the first one reads the last *backbone* map, each further one the level before.
    Source: Deformable-DETR section 4.1; mmdet ``ChannelMapper``.

    Args:
        bottom_up: backbone that returns a dict of maps.
        in_features: names of its outputs to use, finest first.
        out_channels: width C of every level.
        num_extra_levels: coarser levels to add.
        num_groups: groups of the normalization; None: no normalization but a bias (DETR).

    Raises:
        ConfigError: if ``bottom_up`` lacks one of ``in_features``.
    """

    def __init__(
        self,
        *,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int,
        num_extra_levels: int = 1,
        num_groups: int | None = 32,
    ):
        super().__init__()
        shapes = bottom_up.output_shape()
        missing = [name for name in in_features if name not in shapes]
        if missing:
            raise ConfigError(
                f"backbone.in_features names {missing}, but the backbone only returns "
                f"{sorted(shapes)}; add them to its out_features or change in_features."
            )
        self.bottom_up = bottom_up
        self.in_features = list(in_features)
        inputs = [shapes[name] for name in self.in_features]

        def unit(in_channels: int, kernel_size: int, stride: int) -> Conv2d:
            return Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride=stride,
                padding=kernel_size // 2,
                bias=num_groups is None,
                norm=None if num_groups is None else nn.GroupNorm(num_groups, out_channels),
            )

        self.lateral_convs = nn.ModuleList([unit(shape.channels, 1, 1) for shape in inputs])
        widths = [inputs[-1].channels] + [out_channels] * max(num_extra_levels - 1, 0)
        self.extra_convs = nn.ModuleList([unit(w, 3, 2) for w in widths[:num_extra_levels]])
        for conv in [*self.lateral_convs, *self.extra_convs]:
            nn.init.xavier_uniform_(conv.weight)

        strides = [shape.stride for shape in inputs]
        strides += [strides[-1] * 2 ** (i + 1) for i in range(num_extra_levels)]
        self._strides = {f"p{stride.bit_length() - 1}": stride for stride in strides}
        self._out_channels = out_channels

    @property
    def size_divisibility(self) -> int:
        return self.bottom_up.size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return self.bottom_up.padding_constraints

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=self._out_channels, stride=stride)
            for name, stride in self._strides.items()
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``(B, 3, H, W)`` -> maps ``(B, C, H/stride, W/stride)`` named p<log2 stride>."""
        features = self.bottom_up(images)
        maps = [
            conv(features[name])
            for conv, name in zip(self.lateral_convs, self.in_features, strict=True)
        ]
        coarsest = features[self.in_features[-1]]
        for conv in self.extra_convs:
            coarsest = conv(coarsest)
            maps.append(coarsest)
        return dict(zip(self._strides, maps, strict=True))
