"""Probabilistic anchor assignment (PAA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from co_detr.modeling.auxiliary.assigners.gaussian_mixture import fit_mixtures
from co_detr.modeling.auxiliary.assigners.max_iou import MaxIoUAssigner


class PAAAssigner(nn.Module):
    """Probabilistic anchor assignment (Kim and Lee, ECCV 2020, algorithm 1).

    Candidates (``forward``) are anchors with an IoU of at least ``candidate_iou``, and each ground
    truth's best anchors. What the head predicts for them then decides (``select``):

    1. of every ground truth and level, the ``topk`` candidates of lowest loss are kept;
    2. two Gaussians are fitted to the losses of all that are kept for a ground truth;
    3. of those that the first one explains better, the one where the mixture is densest is the
       last positive: all of at most its loss are positives (figure 3c of the paper).

    As in the authors' code, a single candidate is positive, and so are all candidates if the
    first Gaussian explains none of them better.
    """

    def __init__(self, candidate_iou: float = 0.1, topk: int = 9, max_pairs: int = 1 << 20):
        super().__init__()
        self.topk = topk
        self.candidates = MaxIoUAssigner(candidate_iou, candidate_iou, max_pairs)

    def forward(self, anchors: list[Tensor], gt_boxes: Tensor) -> Tensor:
        """Candidates of one image; see the package for arguments and result."""
        return self.candidates(anchors, gt_boxes)

    @torch.no_grad()
    def select(self, truths: Tensor, levels: Tensor, losses: Tensor) -> Tensor:
        """Which of an image's P candidates are positives.

        Args:
            truths, levels: ``(P,)`` int64, ground truth and level of each.
            losses: ``(P,)`` what each would cost as a positive.

        Returns:
            ``(P,)`` bool.
        """
        positive = torch.zeros_like(truths, dtype=torch.bool)
        if len(truths) == 0:
            return positive
        group = truths * (levels.max() + 1) + levels
        kept = (_rank(group, losses) < self.topk).nonzero().squeeze(1)
        # One row for each ground truth that has candidates, lowest loss first.
        row = truths[kept].unique(return_inverse=True)[1]
        rank = _rank(row, losses[kept])
        shape = [each + 1 for each in torch.stack([row.max(), rank.max()]).tolist()]
        valid = torch.zeros(shape, dtype=torch.bool, device=losses.device)
        valid[row, rank] = True
        values = losses.new_zeros(shape, dtype=torch.float64)
        values[row, rank] = losses[kept].double()
        positive[kept] = rank <= _last_positive(values, valid)[row]
        return positive


def _last_positive(values: Tensor, valid: Tensor) -> Tensor:
    """``(G, N)`` losses in ascending order -> ``(G,)`` index of the last positive."""
    parts = fit_mixtures(values, valid).log_densities(values)  # (G, N, 2)
    foreground = valid & (parts[..., 0] >= parts[..., 1])
    density = torch.where(foreground, parts.logsumexp(-1), -torch.inf)
    count = valid.sum(1)
    everything = (count == 1) | ~foreground.any(1)
    return torch.where(everything, count - 1, density.argmax(1))


def _rank(group: Tensor, values: Tensor) -> Tensor:
    """``(P,)`` position of each value inside its group, in ascending order."""
    order = values.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    sizes = group[order].unique_consecutive(return_counts=True)[1]
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - starts
    return rank
