"""RPN anchors of a location: ratio outside, size inside in mmdet; the other way in Detectron2."""

from __future__ import annotations

import torch
from torch import Tensor

from co_detr.parity.build import RATIOS


def level_order(counts: list[int], num_anchors: int) -> Tensor:
    """Index that turns the reference's rows into Detectron2's, ``detectron2 = reference[order]``.

    Args:
        counts: anchors per level; num_anchors: anchors per location.
    """
    within = torch.arange(num_anchors).view(RATIOS, -1).t().flatten()
    cells = torch.arange(sum(counts) // num_anchors)
    return (cells[:, None] * num_anchors + within).flatten()


def to_reference(rows: Tensor, order: Tensor) -> Tensor:
    """Detectron2's rows ``(R, ...)`` in the reference's order."""
    out = torch.empty_like(rows)
    out[order] = rows
    return out


def channels_to_reference(maps: Tensor, num_anchors: int) -> Tensor:
    """Detectron2's maps ``(B, A * width, H, W)`` in the reference's order."""
    grouped = maps.unflatten(1, (num_anchors // RATIOS, RATIOS, -1))
    return grouped.transpose(1, 2).flatten(1, 3)
