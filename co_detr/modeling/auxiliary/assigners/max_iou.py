"""Assignment by the largest overlap (RetinaNet, RPN)."""

from __future__ import annotations

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor, nn

from co_detr.modeling.auxiliary.assigners.labels import BACKGROUND, IGNORED


class MaxIoUAssigner(nn.Module):
    """Every anchor belongs to the ground truth that it overlaps most.

    1. It is positive from an IoU of ``foreground_from`` on, background below ``background_below``
       and ignored in between (Detectron2's ``Matcher``).
    2. The anchors that overlap a ground truth most, of all anchors, are positive at any IoU above
       0. As in Detectron2 they keep the ground truth that they overlap most themselves.

    The (ground truths x anchors) IoU matrix is never whole: ``max_pairs`` entries are computed at a
    time. Source: RetinaNet (ICCV 2017) section 4; Faster R-CNN section 3.1.2 for step 2.
    """

    def __init__(
        self,
        background_below: float = 0.4,
        foreground_from: float = 0.5,
        max_pairs: int = 1 << 20,
    ):
        super().__init__()
        self.matcher = Matcher([background_below, foreground_from], [0, -1, 1])
        self.max_pairs = max_pairs

    @torch.no_grad()
    def forward(self, anchors: list[Tensor], gt_boxes: Tensor) -> Tensor:
        """Assigns one image; see the package for arguments and result."""
        flat, truths = torch.cat(anchors), Boxes(gt_boxes)
        assigned = flat.new_full((len(flat),), BACKGROUND, dtype=torch.long)
        if len(gt_boxes) == 0 or len(flat) == 0:
            return assigned
        size = max(1, self.max_pairs // len(gt_boxes))
        parts = list(zip(flat.split(size), assigned.split(size), strict=True))
        bests = flat.new_empty(len(parts), len(gt_boxes), dtype=torch.float32)
        matches = torch.empty_like(assigned)
        for (some, result), best, match in zip(parts, bests, matches.split(size), strict=True):
            overlaps = pairwise_iou(truths, Boxes(some))  # (G, n)
            best.copy_(overlaps.amax(1))
            found, label = self.matcher(overlaps)
            match.copy_(found)
            result.copy_(
                torch.where(label == 1, found, torch.where(label == 0, BACKGROUND, IGNORED))
            )
        best = bests.amax(0)  # (G,)
        for (some, result), own_best, match in zip(parts, bests, matches.split(size), strict=True):
            here = (own_best == best) & (best > 0)  # few: most have their best anchors elsewhere
            is_best = (pairwise_iou(truths[here], Boxes(some)) == best[here, None]).any(0)
            result.copy_(torch.where(is_best, match, result))
        return assigned
