"""How dense heads write a box relative to its anchor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from torch import Tensor


class BoxCode(Protocol):
    """A code of ``num_outputs`` (X) network outputs per anchor; boxes are absolute xyxy."""

    num_outputs: int

    def decode(self, outputs: Tensor, anchors: Tensor) -> Tensor:
        """Outputs ``(N, X)`` at anchors ``(N, 4)`` -> boxes ``(N, 4)``."""

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Boxes ``(N, 4)`` at anchors ``(N, 4)`` -> what is regressed, ``(N, 4)``."""


class DeltaCode:
    """Shift of the centre and log ratio of the sides (R-CNN): Detectron2's ``Box2BoxTransform``."""

    num_outputs = 4

    def __init__(self, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)):
        self.transform = Box2BoxTransform(weights=tuple(weights))

    def decode(self, outputs: Tensor, anchors: Tensor) -> Tensor:
        return decode_deltas(self.transform, outputs, anchors)

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        return self.transform.get_deltas(anchors, boxes)


class DistanceCode:
    """Distances from the anchor's centre to the four sides, in sides of the (square) anchor.

    Detectron2's ``Box2BoxTransformLinear``: negative distances count as 0. Source: FCOS.
    """

    num_outputs = 4

    def __init__(self):
        self.transform = Box2BoxTransformLinear(normalize_by_size=True)

    def decode(self, outputs: Tensor, anchors: Tensor) -> Tensor:
        return self.transform.apply_deltas(outputs, anchors)

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        return self.transform.get_deltas(anchors, boxes)


class DistributionCode:
    """A distribution over the distance to each side: logits of 0, 1, ... ``max_distance`` strides.

    The distance is the mean of the distribution. Source: Li et al., "Generalized Focal Loss",
    NeurIPS 2020, section 3.3.

    Args:
        anchor_scale: side of the anchors in strides.
    """

    def __init__(self, max_distance: int = 16, anchor_scale: float = 8.0):
        self.max_distance = max_distance
        self.anchor_scale = anchor_scale
        self.num_outputs = 4 * (max_distance + 1)
        self.distances = DistanceCode()

    def decode(self, outputs: Tensor, anchors: Tensor) -> Tensor:
        shares = outputs.unflatten(1, (4, -1)).softmax(-1)  # (N, 4, max_distance + 1)
        strides = torch.arange(shares.shape[-1], device=shares.device, dtype=shares.dtype)
        # A product with a vector would run in half precision under autocast.
        return self.distances.decode((shares * strides).sum(-1) / self.anchor_scale, anchors)

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """In strides, not bounded."""
        return self.distances.encode(boxes, anchors) * self.anchor_scale


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
