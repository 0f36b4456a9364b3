"""Sine encodings of grids and of boxes (paper: Vaswani et al. 2017; DETR, Deformable-DETR)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from co_detr.errors import ConfigError


class SinePosition(nn.Module):
    """Encodes the position of every cell of a padded map.

    Coordinates count un-padded cells, are divided by the extent of the image and scaled to 2 pi.

    Args:
        embed_dim: channels C of the encoding: the first half codes y, the second x.
        temperature: 10000 in Deformable-DETR, 20 in DINO.
        offset: added to the 1-based cell number; -0.5 (cell centres) in Deformable-DETR, 0 in DINO.

    Raises:
        ConfigError: if ``embed_dim`` is not a multiple of 4.
    """

    def __init__(self, embed_dim: int, temperature: float = 10000.0, offset: float = -0.5):
        super().__init__()
        if embed_dim % 4:
            raise ConfigError(f"SinePosition needs embed_dim divisible by 4, got {embed_dim}.")
        self.num_features = embed_dim // 2
        self.temperature = temperature
        self.offset = offset

    def forward(
        self,
        padding_mask: Tensor,
        dtype: torch.dtype = torch.float32,
        valid_ratio: Tensor | None = None,
    ) -> Tensor:
        """``(B, H, W)`` bool (True = padding) -> ``(B, C, H, W)``.

        Args:
            valid_ratio: ``(B, 2)``, the image's exact share of the map's width and height, of which
                it may cover the last cell in part; None: it covers all cells that it touches.
        """
        inside = (~padding_mask).to(dtype)
        encodings = []
        for axis in (1, 2):
            cells = inside.cumsum(axis)
            if valid_ratio is None:
                extent = cells.narrow(axis, cells.shape[axis] - 1, 1)
            else:
                extent = valid_ratio[:, 2 - axis, None, None] * cells.shape[axis]
            angle = (cells + self.offset) / (extent + 1e-6) * (2 * math.pi)
            encodings.append(sine_features(angle, self.num_features, self.temperature))
        return torch.cat(encodings, dim=3).permute(0, 3, 1, 2)


def cell_centres(height: int, width: int, like: Tensor) -> Tensor:
    """``(height * width, 2)`` xy of a map's cells in cells, row by row, as ``like`` in type."""
    y = torch.arange(height, dtype=like.dtype, device=like.device) + 0.5
    x = torch.arange(width, dtype=like.dtype, device=like.device) + 0.5
    # Not repeat_interleave, whose translation to ONNX fails where the size is an input.
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)


def encode_boxes(boxes: Tensor, features_per_coordinate: int) -> Tensor:
    """Codes normalised boxes ``(B, Q, 4)`` as ``(B, Q, 4 * features)``, order cx, cy, w, h."""
    return sine_features(boxes * (2 * math.pi), features_per_coordinate, 10000.0).flatten(2)


def sine_features(angle: Tensor, num_features: int, temperature: float) -> Tensor:
    """``(...)`` angles -> ``(..., num_features)``, sine and cosine interleaved."""
    exponent = torch.arange(num_features, dtype=angle.dtype, device=angle.device)
    exponent = 2 * exponent.div(2, rounding_mode="floor") / num_features
    phase = angle[..., None] / temperature**exponent
    return torch.stack([phase[..., 0::2].sin(), phase[..., 1::2].cos()], dim=-1).flatten(-2)
