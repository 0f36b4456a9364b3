"""How dense heads write a box relative to its anchor.

A box code has ``num_outputs`` numbers X per anchor and ``decode(outputs (N, X), anchors (N, 4)) ->
(N, 4)``, all boxes absolute xyxy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor


class DeltaCode:
    """Shift of the centre and log ratio of the sides (R-CNN): Detectron2's ``Box2BoxTransform``."""

    num_outputs = 4

    def __init__(self, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)):
        self.transform = Box2BoxTransform(weights=tuple(weights))

    def decode(self, outputs: Tensor, anchors: Tensor) -> Tensor:
        return decode_deltas(self.transform, outputs, anchors)


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
