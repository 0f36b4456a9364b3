"""Multi-scale adapter: from the encoder's levels to the pyramid that auxiliary heads expect."""

from __future__ import annotations

from detectron2.layers import Conv2d
from torch import Tensor, nn

from co_detr.structures import EncoderMemory


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
        return {f"p{self.finest + level}": each for level, each in enumerate(maps)}


def normed_conv(embed_dim: int, num_groups: int, stride: int = 1) -> Conv2d:
    """3x3 convolution and GroupNorm, ``(B, C, H, W)`` -> ``(B, C, H/stride, W/stride)``."""
    norm = nn.GroupNorm(num_groups, embed_dim)
    return Conv2d(embed_dim, embed_dim, 3, stride=stride, padding=1, norm=norm)
