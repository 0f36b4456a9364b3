"""ResNets of any width, which Detectron2's ``ResNet.make_default_stages`` does not offer."""

from __future__ import annotations

from detectron2.layers import CNNBlockBase
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock

from co_detr.errors import ConfigError

BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


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
