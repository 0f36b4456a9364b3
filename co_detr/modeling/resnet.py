"""What Detectron2's ResNet lacks: activation checkpointing, and stages of any width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.layers import CNNBlockBase
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
