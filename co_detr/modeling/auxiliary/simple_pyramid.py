"""Single-scale adapter: from the one map of the encoder to the pyramid that heads expect."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from co_detr.errors import ConfigError
from co_detr.modeling.auxiliary.pyramid import normed_conv
from co_detr.structures import EncoderMemory


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
        self.names = [f"p{each.bit_length() - 1}" for each in strides]
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
