"""Assignment of points near the centres of objects (FCOS)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from co_detr.modeling.auxiliary.assigners.labels import BACKGROUND


class CentreSamplingAssigner(nn.Module):
    """FCOS (Tian et al., ICCV 2019, section 3) with centre sampling.

    Anchors are points: squares of the side of their level's stride, of which the centre counts. A
    point belongs to a ground truth if

    1. it lies inside the box, and nearer than ``radius`` strides to its centre, along both axes;
    2. the longest of its distances to the four sides is in the range of its level, which is
       ``reach`` / 2 to ``reach`` strides; the finest level has no lower and the coarsest no upper
       end. With 8 and strides 8, 16, ... these are the paper's 64, 128, 256 and 512 pixels.

    A point with several ground truths takes the smallest one. Memory is bounded by ``max_pairs``
    (points x ground truths) at a time.
    """

    def __init__(self, radius: float = 1.5, reach: float = 8.0, max_pairs: int = 1 << 20):
        super().__init__()
        self.radius = radius
        self.reach = reach
        self.max_pairs = max_pairs

    @torch.no_grad()
    def forward(self, anchors: list[Tensor], gt_boxes: Tensor) -> Tensor:
        """Assigns one image; see the package for arguments and result."""
        if len(gt_boxes) == 0:
            flat = torch.cat(anchors)
            return flat.new_full((len(flat),), BACKGROUND, dtype=torch.long)
        assigned = []
        for number, level in enumerate(anchors):
            first, last = number == 0, number == len(anchors) - 1
            lower, upper = 0.0 if first else self.reach / 2, math.inf if last else self.reach
            for some in level.split(max(1, self.max_pairs // len(gt_boxes))):
                assigned.append(self._assign(some, gt_boxes, lower, upper))
        return torch.cat(assigned)

    def _assign(self, anchors: Tensor, gt_boxes: Tensor, lower: float, upper: float) -> Tensor:
        """Points ``(n, 4)`` of one level, its range in strides -> ``(n,)``."""
        points = (anchors[:, None, :2] + anchors[:, None, 2:]) / 2
        stride = anchors[:, 2:3] - anchors[:, :1]
        low, high = points - gt_boxes[:, :2], gt_boxes[:, 2:] - points  # (n, G, 2)
        inside = torch.minimum(low, high).amin(-1) > 0
        central = (low - high).abs().amax(-1) / 2 < self.radius * stride
        longest = torch.maximum(low, high).amax(-1)
        in_range = (longest >= lower * stride) & (longest <= upper * stride)
        width, height = (gt_boxes[:, 2:] - gt_boxes[:, :2]).unbind(-1)
        areas = width * height
        areas = torch.where(inside & central & in_range, areas, math.inf)
        smallest, index = areas.min(1)
        return torch.where(smallest < math.inf, index, BACKGROUND)
