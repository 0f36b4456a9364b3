"""What dense heads share: targets and predictions per anchor, and the geometry of cells."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor


@dataclass(frozen=True)
class DenseTargets:
    """Assignment of all R anchors of B images.

    Attributes:
        labels: ``(B, R)`` in [0, K]; K is background, also for anchors in the padding.
        boxes: ``(B, R, 4)`` absolute xyxy ground truth; zeros for background.
        inside: ``(B, R)`` bool, False for anchors whose cell lies in the batch padding.
    """

    labels: Tensor
    boxes: Tensor
    inside: Tensor


@dataclass(frozen=True)
class DensePredictions:
    """Per anchor: class logits ``(B, R, K)``, deltas ``(B, R, 4)``, centreness ``(B, R)``."""

    logits: Tensor
    deltas: Tensor
    centreness: Tensor


def centreness_target(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Centreness of anchor centres in their boxes, ``(N, 4), (N, 4)`` xyxy -> ``(N,)`` in (0, 1].

    Source: FCOS equation 3.
    """
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    low, high = centre - boxes[:, :2], boxes[:, 2:] - centre
    ratio = torch.minimum(low, high) / torch.maximum(low, high)
    return ratio.prod(1).sqrt()


def decode_deltas(transform: Box2BoxTransform, deltas: Tensor, anchors: Tensor) -> Tensor:
    """Deltas ``(N, 4)`` of ``(N, 4)`` xyxy anchors -> absolute xyxy ``(N, 4)``.

    Log sizes are clamped on both sides as in mmdet; Detectron2's transform clamps above only.
    """
    width, height = (
        deltas[:, axis, None].clamp(min=-transform.scale_clamp * transform.weights[axis])
        for axis in (2, 3)
    )
    deltas = torch.cat([deltas[:, :2], width, height], dim=1)
    return transform.apply_deltas(deltas, anchors)


def flatten_map(x: Tensor) -> Tensor:
    """Map ``(B, X, H, W)`` -> rows ``(B, H*W, X)``."""
    return x.flatten(2).transpose(1, 2)


def inside_cells(feature: Tensor, stride: int, image_size: tuple[int, int]) -> Tensor:
    """``(H*W,)`` bool: cells that begin inside the un-padded image."""
    height, width = feature.shape[-2:]
    row = torch.arange(height, device=feature.device) * stride < image_size[0]
    column = torch.arange(width, device=feature.device) * stride < image_size[1]
    return (row[:, None] & column[None, :]).flatten()


def gather_cells(maps: list[Tensor], image: int, indices: Tensor) -> Tensor:
    """Features ``(n, C)`` of cells, indexed over all levels; no level is copied or synced on."""
    gathered, start = None, 0
    for feature in maps:
        cells = feature[image].flatten(1)  # (C, H*W)
        local = (indices - start).clamp(0, cells.shape[1] - 1)
        rows = cells[:, local].transpose(0, 1)
        here = (indices >= start) & (indices < start + cells.shape[1])
        gathered = rows if gathered is None else torch.where(here[:, None], rows, gathered)
        start += cells.shape[1]
    return gathered
