"""Layers of EVA-02 style vision transformers (paper: Fang et al., 2023).

Rotary positions, attention in windows or over the whole map, and a gated feed-forward network
(SwiGLU) with a normalisation inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.utils import window_partition, window_unpartition
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

NORM_EPS = 1e-6


@dataclass(frozen=True)
class RotaryTable:
    """Cosine and sine of every channel's angle at every token, both ``(H * W, D)``.

    D is the width of an attention head.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of_map(
        cls, height: int, width: int, head_dim: int, *, device: torch.device, dtype: torch.dtype
    ) -> RotaryTable:
        """The table of a map or window of ``height`` x ``width`` tokens.

        The first half of a head's channels turns with the row, the second with the column.
        Positions are stretched to the 16 x 16 tokens of the pretraining, whatever the map's size.
        """
        channels = head_dim // 2
        exponent = torch.arange(0, channels, 2, device=device).to(dtype) / channels
        frequencies = 1.0 / 10000**exponent  # one per pair of neighbouring channels

        def angles(length: int) -> Tensor:
            position = torch.arange(length, device=device).to(dtype) / length * 16
            return (position[:, None] * frequencies).repeat_interleave(2, dim=1)

        rows = angles(height)[:, None].expand(height, width, channels)
        columns = angles(width)[None].expand(height, width, channels)
        angle = torch.cat([rows, columns], dim=-1).flatten(0, 1)
        return cls(angle.cos(), angle.sin())

    def rotate(self, heads: Tensor) -> Tensor:
        """Turns each pair of neighbouring channels of ``(..., H * W, D)`` by its angle."""
        first, second = heads.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-second, first], dim=-1).flatten(-2)
        # The table is kept in float32 at least, so half precision is left here and resumed after.
        return (heads * self.cos + turned * self.sin).to(heads.dtype)


class RotaryAttention(nn.Module):
    """Multi-head self-attention with rotary positions; keys have no bias."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels, bias=False)
        self.v_proj = nn.Linear(channels, channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, rotary: RotaryTable) -> Tensor:
        """``(B, H, W, C)`` -> the same shape; every token attends to all of its map."""
        height, width = x.shape[1:3]

        def split_heads(projected: Tensor) -> Tensor:
            # (B, H, W, C) -> (B, heads, H * W, D)
            return projected.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        query = rotary.rotate(split_heads(self.q_proj(x)))
        key = rotary.rotate(split_heads(self.k_proj(x)))
        value = split_heads(self.v_proj(x))
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2).unflatten(1, (height, width)))


class SwiGLU(nn.Module):
    """Feed-forward network ``w3(norm(silu(w1 x) * w2 x))``."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(channels, hidden)
        self.w2 = nn.Linear(channels, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=NORM_EPS)
        self.w3 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` -> the same shape."""
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class ViTBlock(nn.Module):
    """Pre-norm attention and feed-forward network.

    Args:
        channels: width C.
        num_heads: attention heads.
        mlp_ratio: width of the hidden layer over C, rounded down.
        window_size: side in tokens of the windows that attention stays in; 0: the whole map. Maps
            are padded to whole windows, and the padding is attended to, as in the reference.
        drop_path: of both residual branches.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_heads: int,
        mlp_ratio: float,
        window_size: int,
        drop_path: StochasticDepth,
    ):
        super().__init__()
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(channels, eps=NORM_EPS)
        self.attn = RotaryAttention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels, eps=NORM_EPS)
        self.mlp = SwiGLU(channels, int(channels * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor, rotary: RotaryTable) -> Tensor:
        """``(B, H, W, C)`` -> the same shape. ``rotary`` is of the window, or of the whole map."""
        x = x + self.drop_path(self._attend(self.norm1(x), rotary))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, rotary: RotaryTable) -> Tensor:
        if not self.window_size:
            return self.attn(x, rotary)
        windows, padded = window_partition(x, self.window_size)
        windows = self.attn(windows, rotary)
        return window_unpartition(windows, self.window_size, padded, x.shape[1:3])
