"""Adaptive training sample selection (ATSS)."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor, nn


class ATSSAssigner(nn.Module):
    """Adaptive training sample selection (Zhang et al., CVPR 2020, algorithm 1).

    For every ground truth:

    1. candidates are the ``topk`` anchors of each level whose centres are nearest to its centre;
    2. the threshold is the mean plus the (unbiased) standard deviation of the candidates' IoU;
    3. candidates at or above it whose centre lies inside the box, by more than 0.01 pixels, are
       positive. An anchor claimed by several ground truths goes to the one of highest IoU.

    Only candidates' overlaps are computed, never an (anchors x ground truths) IoU matrix, and
    distances for ``max_pairs`` pairs at a time: memory does not grow with the crowd.
    """

    def __init__(self, topk: int = 9, max_pairs: int = 1 << 22):
        super().__init__()
        self.topk = topk
        self.max_pairs = max_pairs

    @torch.no_grad()
    def forward(self, anchors: list[Tensor], gt_boxes: Tensor) -> Tensor:
        """Assigns one image.

        Args:
            anchors: ``(R_l, 4)`` absolute xyxy per level.
            gt_boxes: ``(G, 4)`` absolute xyxy.

        Returns:
            ``(R,)`` int64: index of the ground truth, -1 for background.
        """
        flat = torch.cat(anchors)
        assigned = flat.new_full((len(flat),), -1, dtype=torch.long)
        num_gts = len(gt_boxes)
        if num_gts == 0 or len(flat) == 0:
            return assigned
        candidates = self._nearest(anchors, gt_boxes)  # (N, G)
        truths = torch.arange(num_gts, device=flat.device).expand_as(candidates)
        overlaps = matched_pairwise_iou(
            Boxes(flat[candidates.flatten()]), Boxes(gt_boxes[truths.flatten()])
        ).view_as(candidates)
        threshold = overlaps.mean(0) + overlaps.std(0)
        centres = _centres(flat)[candidates]  # (N, G, 2)
        margin = torch.cat([centres - gt_boxes[:, :2], gt_boxes[:, 2:] - centres], dim=-1).amin(-1)
        positive = (overlaps >= threshold) & (margin > 0.01)

        best = overlaps.new_full((len(flat),), -1.0)  # Boxes are float32 whatever the anchors are
        best.scatter_reduce_(
            0, candidates.flatten(), torch.where(positive, overlaps, -1.0).flatten(), "amax"
        )
        # The lowest index wins among equal overlaps, as an arg-max over ground truths would say.
        wins = positive & (overlaps == best[candidates])
        winner = torch.where(wins, truths, num_gts)
        first = assigned.new_full((len(flat),), num_gts)
        first.scatter_reduce_(0, candidates.flatten(), winner.flatten(), "amin")
        return torch.where(first < num_gts, first, assigned)

    def _nearest(self, anchors: list[Tensor], gt_boxes: Tensor) -> Tensor:
        """Indices ``(N, G)`` into the concatenated anchors; N is at most topk x levels."""
        chosen, start = [], 0
        truths = _centres(gt_boxes)
        for level in anchors:
            centres, count = _centres(level), min(self.topk, len(level))
            nearest = []
            for some in truths.split(max(1, self.max_pairs // max(1, len(level)))):
                distance = (centres[:, None] - some[None]).pow(2).sum(-1).sqrt()
                nearest.append(distance.topk(count, dim=0, largest=False).indices + start)
            chosen.append(torch.cat(nearest, dim=1))
            start += len(level)
        return torch.cat(chosen)


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2
