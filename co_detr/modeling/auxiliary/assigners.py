"""Assignment of ground truths to dense anchors: ATSS, the largest overlap, center sampling, PAA.

An assigner takes the anchors of one image, ``(R_l, 4)`` absolute xyxy per level, and its ground
truths ``(G, 4)``. It gives ``(R,)`` int64: the index of the ground truth, or BACKGROUND or IGNORED.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor, nn

BACKGROUND = -1
IGNORED = -2


class ATSSAssigner(nn.Module):
    """Adaptive training sample selection (Zhang et al., CVPR 2020, algorithm 1).

    For every ground truth:

    1. candidates are the ``topk`` anchors of each level whose centers are nearest to its center;
    2. the threshold is the mean plus the (unbiased) standard deviation of the candidates' IoU;
    3. candidates at or above it whose center lies inside the box, by more than 0.01 pixels, are
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
        centers = _centers(flat)[candidates]  # (N, G, 2)
        margin = torch.cat([centers - gt_boxes[:, :2], gt_boxes[:, 2:] - centers], dim=-1).amin(-1)
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
        truths = _centers(gt_boxes)
        for level in anchors:
            centers, count = _centers(level), min(self.topk, len(level))
            nearest = []
            for some in truths.split(max(1, self.max_pairs // max(1, len(level)))):
                distance = (centers[:, None] - some[None]).pow(2).sum(-1).sqrt()
                nearest.append(distance.topk(count, dim=0, largest=False).indices + start)
            chosen.append(torch.cat(nearest, dim=1))
            start += len(level)
        return torch.cat(chosen)


def _centers(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


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
        """Assigns one image; see the module for arguments and result."""
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


class CenterSamplingAssigner(nn.Module):
    """FCOS (Tian et al., ICCV 2019, section 3) with center sampling.

    Anchors are points: squares of the side of their level's stride, of which the center counts. A
    point belongs to a ground truth if

    1. it lies inside the box, and nearer than ``radius`` strides to its center, along both axes;
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
        """Assigns one image; see the module for arguments and result."""
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
        """Candidates of one image; see the module for arguments and result."""
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
        shape = [largest + 1 for largest in torch.stack([row.max(), rank.max()]).tolist()]
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


_LOG_2_PI = math.log(2 * math.pi)
_LOOK_EVERY = 8  # iterations; most mixtures take five to twenty


@dataclass(frozen=True)
class GaussianMixtures:
    """G mixtures of two components: ``weights``, ``means`` and ``variances``, each ``(G, 2)``."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def log_densities(self, values: Tensor) -> Tensor:
        """Weighted log density of both components at ``(G, N)`` values: ``(G, N, 2)``."""
        distance = (values[..., None] - self.means[:, None]).square() / self.variances[:, None]
        scale = self.weights.log() - 0.5 * (self.variances.log() + _LOG_2_PI)
        return scale[:, None] - 0.5 * distance


def fit_mixtures(
    values: Tensor,
    valid: Tensor,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
    smallest_variance: float = 1e-6,
) -> GaussianMixtures:
    """Expectation maximization from the smallest and the largest value as means.

    A mixture is done when its mean log likelihood changes by less than ``tolerance``; these are
    the steps and the defaults of scikit-learn's ``GaussianMixture``, which PAA uses.

    Args:
        values: ``(G, N)``, rows padded with anything finite.
        valid: ``(G, N)`` bool, False for padding; at least one True in each row.
    """
    values = values.double()
    first = torch.where(valid, values, math.inf).amin(1)
    last = torch.where(valid, values, -math.inf).amax(1)
    means = torch.stack([first, last], dim=1)
    fitted = GaussianMixtures(torch.full_like(means, 0.5), means, torch.ones_like(means))
    count = valid.sum(1)  # (G,)
    bound = torch.full_like(first, -math.inf)
    running = torch.ones_like(first, dtype=torch.bool)
    for iteration in range(max_iterations):
        parts = fitted.log_densities(values)  # (G, N, 2)
        total = parts.logsumexp(-1)
        shares = (parts - total[..., None]).exp() * valid[..., None]
        fitted = _maximize(fitted, running[:, None], values, shares, smallest_variance)
        previous, bound = bound, (total * valid).sum(1) / count
        running = running & ((bound - previous).abs() >= tolerance)
        # A mixture that is done stays as it is, so looking now and then, which makes the host wait
        # for the device, gives the same result.
        if iteration % _LOOK_EVERY == _LOOK_EVERY - 1 and not running.any():
            break
    return fitted


def _maximize(
    fitted: GaussianMixtures,
    running: Tensor,
    values: Tensor,
    shares: Tensor,
    smallest_variance: float,
) -> GaussianMixtures:
    """Weighted moments, ``shares (G, N, 2)`` as weights, of the mixtures that still run."""
    # A component may lose all its values.
    mass = shares.sum(1) + 10 * torch.finfo(values.dtype).eps  # (G, 2)
    means = (shares * values[..., None]).sum(1) / mass
    distance = (values[..., None] - means[:, None]).square()
    variances = (shares * distance).sum(1) / mass + smallest_variance
    return GaussianMixtures(
        torch.where(running, mass / mass.sum(1, keepdim=True), fitted.weights),
        torch.where(running, means, fitted.means),
        torch.where(running, variances, fitted.variances),
    )
