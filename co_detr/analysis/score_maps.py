"""From a value per token to score maps in the resolution of the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FUSED = "fused"


@dataclass(frozen=True)
class Geometry:
    """How the levels of one image lie over its pixels.

    Attributes:
        image_size: (height, width) of the image itself, without any padding.
        padded_size: (height, width) of the batch, which the levels cover.
        level_shapes: (height, width) of each level, finest first.
    """

    image_size: tuple[int, int]
    padded_size: tuple[int, int]
    level_shapes: Sequence[tuple[int, int]]

    def cells_inside(self, level: int) -> tuple[int, int]:
        """Rows and columns of a level that begin inside the image.

        These are the ones that the encoder does not mask; where a model takes the padding for a
        part of the image, they are still left out here.
        """
        rows, columns = (
            -(-size * cells // padded)
            for size, cells, padded in zip(
                self.image_size, self.level_shapes[level], self.padded_size, strict=True
            )
        )
        return rows, columns


@dataclass(frozen=True)
class ScoreMaps:
    """Scores in [0, 1] of one image, ``(H, W)`` each: one map per level, and their mean."""

    levels: list[Tensor]
    fused: Tensor

    def named(self) -> dict[str, Tensor]:
        """All of them by name: "fused", then "level 1", the finest, and so on."""
        levels = {f"level {number}": each for number, each in enumerate(self.levels, start=1)}
        return {FUSED: self.fused, **levels}


def score_maps(values: Sequence[Tensor], geometry: Geometry) -> ScoreMaps:
    """Score maps of one image as the paper makes them.

    Every level is divided by its maximum, resized to the image, and the mean over levels is taken.
    Padding is cut off first: it is in no maximum and does not bleed into the image.
    Source: Co-DETR equation 7. What it leaves open is filled in from its authors' answer to a
    question about it: the maximum is one of the level before it is resized, bilinearly.

    Args:
        values: ``(H_l, W_l)`` per level, not negative. A level without any positive value has the
            score 0 everywhere.
    """
    levels = []
    for level, each in enumerate(values):
        rows, columns = geometry.cells_inside(level)
        inside = each[:rows, :columns]
        inside = inside / inside.max().clamp(min=torch.finfo(inside.dtype).tiny)
        resized = F.interpolate(
            inside[None, None], geometry.image_size, mode="bilinear", align_corners=False
        )
        levels.append(resized[0, 0])
    return ScoreMaps(levels, torch.stack(levels).mean(0))


def fold(values: Tensor, level_shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Values of all tokens ``(S,)`` -> ``(H_l, W_l)`` per level."""
    parts = values.split([height * width for height, width in level_shapes])
    return [part.view(shape) for part, shape in zip(parts, level_shapes, strict=True)]
