"""From decoded query groups to losses: matching, one criterion for all groups, normalizers.

Boxes and how they overlap stand at the end. Units are in the names: xyxy absolute, cxcywh
normalized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from co_detr.modeling.geometry import Geometry
from co_detr.structures import (
    AssignedTargets,
    GroundTruth,
    Predictions,
    QueryGroup,
    StepCounts,
    to_device,
)

# The reference divides by (normalizer + eps) in all its losses.
EPS = torch.finfo(torch.float32).eps
# Logits whose loss is computed at a time. Elementwise losses keep half a dozen tensors of the size
# of their input for the backward pass: nothing for 80 classes, gigabytes for the 1203 of LVIS.
MAX_LOGITS = 1 << 22


@dataclass(frozen=True)
class Assignment:
    """Targets of every group, in order, and of the encoder proposals by group name."""

    groups: list[AssignedTargets]
    proposals: dict[str, AssignedTargets]


def assign_targets(
    groups: list[QueryGroup],
    predictions: list[Predictions],
    ground_truth: list[GroundTruth],
    assigner: HungarianAssigner,
    num_classes: int,
) -> Assignment:
    """Matches, in one go, all groups and encoder proposals that have no targets yet."""
    as_object = [replace(truth, labels=torch.zeros_like(truth.labels)) for truth in ground_truth]
    problems = {}
    for index, (group, predicted) in enumerate(zip(groups, predictions, strict=True)):
        if group.targets is None:
            truth = [_repeated(image, group.truth_repeats) for image in ground_truth]
            problems[index] = MatchingProblem(predicted, truth, num_classes)
        if group.proposals is not None:
            truth = as_object if group.proposals.binary else ground_truth
            problems[group.name] = MatchingProblem(group.proposals.predictions, truth, num_classes)
    solved = dict(zip(problems, assigner(list(problems.values())), strict=True))
    return Assignment(
        groups=[
            solved[index] if group.targets is None else group.targets
            for index, group in enumerate(groups)
        ],
        proposals={name: value for name, value in solved.items() if isinstance(name, str)},
    )


def _repeated(truth: GroundTruth, times: int) -> GroundTruth:
    return replace(
        truth,
        labels=truth.labels.repeat(times),
        boxes=truth.boxes.repeat(times, 1),
        weights=None if truth.weights is None else truth.weights.repeat(times),
    )


@dataclass(frozen=True)
class MatchingProblem:
    """Predictions of D layers and what they are matched to; ``num_classes`` labels background."""

    predictions: Predictions
    ground_truth: list[GroundTruth]
    num_classes: int


class HungarianAssigner(nn.Module):
    """Cheapest one-to-one assignment per image and decoder layer.

    The cost of a pair is ``class_weight`` times the difference of the focal terms,
    plus ``bbox_weight`` times the L1 distance of normalized boxes, minus ``giou_weight`` times
    the GIoU in pixels. Costs are float32 whatever the model's precision. All costs of a step go
    to the host in one transfer, and come back as one.
    Source: Deformable-DETR's matcher; mmdet ``HungarianAssigner`` with ``FocalLossCost``.
    """

    def __init__(
        self,
        *,
        class_weight: float = 2.0,
        bbox_weight: float = 5.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ):
        super().__init__()
        self.class_weight = class_weight
        self.bbox_weight = bbox_weight
        self.giou_weight = giou_weight
        self.alpha = alpha
        self.gamma = gamma

    @torch.no_grad()
    def forward(self, problems: list[MatchingProblem]) -> list[AssignedTargets]:
        """Solves all problems of a step.

        Returns:
            per problem, targets with labels ``(D, B, Q)``, boxes ``(D, B, Q, 4)`` and weights,
            which are 1 or those of the matched ground truths.
        """
        costs = [
            self.cost(problem.predictions, image, truth)
            for problem in problems
            for image, truth in enumerate(problem.ground_truth)
        ]
        host = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
        # A diverged model has NaN costs. Any assignment will do then: its loss is NaN as well,
        # and the trainer reports that with the names of the images.
        host = np.nan_to_num(host, nan=1e5, posinf=1e5, neginf=-1e5)
        matched, start = [], 0
        for cost in costs:  # (D, Q, G)
            block = host[start : start + cost.numel()].reshape(cost.shape)
            matched.append(torch.from_numpy(solve_assignment(block)))
            start += cost.numel()
        device = costs[0].device
        flat = to_device(torch.cat([m.flatten() for m in matched]), device)
        indices = iter(flat.split([m.numel() for m in matched]))
        shapes = iter([m.shape for m in matched])
        return [
            _targets(
                torch.stack([next(indices).view(next(shapes)) for _ in problem.ground_truth], 1),
                problem,
            )
            for problem in problems
        ]

    def cost(self, predictions: Predictions, image: int, truth: GroundTruth) -> Tensor:
        """Weighted cost ``(D, Q, G)`` of one image's queries and ground truths, float32."""
        # Classes are picked first: of a large vocabulary only those in the image matter.
        probability = predictions.logits[:, image][..., truth.labels].float().sigmoid()
        boxes = predictions.boxes[:, image].float()
        true_boxes = truth.boxes.float()
        eps = 1e-12
        positive = -(probability + eps).log() * self.alpha * (1 - probability) ** self.gamma
        negative = -(1 - probability + eps).log() * (1 - self.alpha) * probability**self.gamma
        distance = torch.cdist(boxes, true_boxes.expand(len(boxes), -1, -1), p=1)
        factor = truth.factor
        overlap = generalized_iou(
            (cxcywh_to_xyxy(boxes) * factor)[:, :, None],
            (cxcywh_to_xyxy(true_boxes) * factor)[None, None],
        )
        return (
            self.class_weight * (positive - negative)
            + self.bbox_weight * distance
            - self.giou_weight * overlap
        )


def solve_assignment(cost: np.ndarray) -> np.ndarray:
    """``(D, Q, G)`` costs -> ``(D, Q)`` index of the matched ground truth, -1 for none."""
    matched = np.full(cost.shape[:2], -1, dtype=np.int64)
    for layer, layer_cost in enumerate(cost):
        queries, truths = linear_sum_assignment(layer_cost)
        matched[layer, queries] = truths
    return matched


def _targets(matched: Tensor, problem: MatchingProblem) -> AssignedTargets:
    truths = problem.ground_truth
    # One more row than the longest image, so that an image without ground truth has one to read.
    rows = max(len(truth.labels) for truth in truths) + 1
    labels = matched.new_zeros(len(truths), rows)
    boxes = problem.predictions.boxes.new_zeros(len(truths), rows, 4)
    weights = boxes.new_ones(len(truths), rows)
    for image, truth in enumerate(truths):
        labels[image, : len(truth.labels)] = truth.labels
        boxes[image, : len(truth.labels)] = truth.boxes.to(boxes.dtype)
        if truth.weights is not None:
            weights[image, : len(truth.labels)] = truth.weights.to(boxes.dtype)
    image_index = torch.arange(len(truths), device=matched.device)[None, :, None]
    row = matched.clamp(min=0)
    is_matched = matched >= 0
    return AssignedTargets(
        labels=torch.where(is_matched, labels[image_index, row], problem.num_classes),
        boxes=boxes[image_index, row],
        weights=torch.where(is_matched, weights[image_index, row], 1.0),
    )


@dataclass(frozen=True)
class _Scored:
    """What is scored by itself: a group of queries or encoder proposals.

    Attributes:
        num_positives: in all micro-batches of the step; None: as many on average as in this one.
    """

    name: str
    loss_weight: float
    predictions: Predictions
    targets: AssignedTargets
    num_positives: int | None


def score_groups(
    groups: list[QueryGroup],
    predictions: list[Predictions],
    assignment: Assignment,
    geometry: Geometry,
    criterion: SetCriterion,
    counts: StepCounts | None = None,
) -> dict[str, Tensor]:
    """Weighted losses of all groups and encoder proposals by their full names.

    Args:
        counts: of the whole step, to which the losses are then a contribution; None: this batch is
            all of it.
    """
    scored = [
        _Scored(group.name, group.loss_weight, predicted, assigned, _num_positives(group, counts))
        for group, predicted, assigned in zip(groups, predictions, assignment.groups, strict=True)
    ]
    for group in groups:
        if group.proposals is not None:
            predicted, targets = group.proposals.predictions, assignment.proposals[group.name]
            number = None if counts is None else counts.num_matched(predicted.boxes.shape[2])
            scored.append(_Scored(f"{group.name}.enc", 1.0, predicted, targets, number))
    # One reduction over processes for the normalizers of all groups.
    totals = [_positives_of_layers(part, criterion, counts) for part in scored]
    totals = average_over_processes(torch.cat(totals)).split([len(total) for total in totals])
    losses: dict[str, Tensor] = {}
    for part, total in zip(scored, totals, strict=True):
        terms = criterion(part.predictions, part.targets, geometry, total)
        terms = {key: value * part.loss_weight for key, value in terms.items()}
        losses.update(name_layers(part.name, terms))
    return losses


def _num_positives(group: QueryGroup, counts: StepCounts | None) -> int | None:
    if counts is None or group.targets is not None:
        return group.num_positives
    return counts.num_matched(group.num_queries, group.truth_repeats)


def _positives_of_layers(
    part: _Scored, criterion: SetCriterion, counts: StepCounts | None
) -> Tensor:
    """``(D,)`` in all micro-batches of the step."""
    targets = part.targets
    if counts is None:
        return criterion.count_positives(targets)
    if part.num_positives is None:
        return criterion.count_positives(targets) / counts.share(targets.labels.shape[1])
    return targets.boxes.new_full((len(targets.labels),), part.num_positives)


def name_layers(prefix: str, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Splits ``(D,)`` losses into scalars: the last layer has no index, layer i has ``d<i>``."""
    named = {}
    for name, values in losses.items():
        for layer, value in enumerate(values):
            index = "" if layer == len(values) - 1 else f"d{layer}."
            named[f"{prefix}.{index}{name}"] = value
    return named


def average_over_processes(counts: Tensor) -> Tensor:
    """Mean of ``counts`` over all training processes; the input itself if there is one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return counts
    counts = counts.clone()
    dist.all_reduce(counts)
    return counts / dist.get_world_size()


class SetCriterion(nn.Module):
    """Classification, L1 and GIoU losses of all decoder layers at once.

    Every loss is a sum over the queries of the batch divided by the number of positives (as the
    caller averages it over processes, at least 1); background queries count in the
    classification loss only. L1 works on normalized boxes, GIoU on pixels.
    Source: DETR section 3.1, Deformable-DETR; mmdet ``loss_single``.

    Args:
        classification: ``FocalLoss`` or ``QualityFocalLoss``; the latter is told the (detached)
            IoU of every predicted box with its target, on normalized boxes as in the reference.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        classification: nn.Module,
        class_weight: float = 2.0,
        bbox_weight: float = 5.0,
        giou_weight: float = 2.0,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.classification = classification
        self.class_weight = class_weight
        self.bbox_weight = bbox_weight
        self.giou_weight = giou_weight

    def count_positives(self, targets: AssignedTargets) -> Tensor:
        """Number of positives of each layer, ``(D,)``."""
        positive = (targets.labels < self.num_classes) & (targets.weights > 0)
        return positive.flatten(1).sum(1).to(targets.boxes.dtype)

    def forward(
        self,
        predictions: Predictions,
        targets: AssignedTargets,
        geometry: Geometry,
        num_positives: Tensor,
    ) -> dict[str, Tensor]:
        """Scores one group.

        Args:
            predictions: of D layers.
            targets: of D layers or of one that all share.
            geometry: sizes of the images.
            num_positives: ``(D,)`` or ``(1,)`` normalizer.

        Returns:
            ``loss_cls``, ``loss_bbox`` and ``loss_giou``, each ``(D,)`` and weighted.
        """
        dtype = torch.promote_types(predictions.boxes.dtype, torch.float32)
        logits, boxes = predictions.logits.to(dtype), predictions.boxes.to(dtype)
        shape = logits.shape[:3]
        labels = targets.labels.expand(shape)
        box_weights = targets.weights * (targets.labels < self.num_classes)
        factor = geometry.factors.to(dtype)[:, None]
        quality = None
        if self.classification.uses_quality:
            quality = iou(
                cxcywh_to_xyxy(boxes.detach()), cxcywh_to_xyxy(targets.boxes.to(dtype))
            ).expand(shape)
        class_terms = self.classification(logits, labels, quality) * targets.weights
        bbox_terms = (boxes - targets.boxes).abs().sum(-1) * box_weights
        overlap = generalized_iou(
            cxcywh_to_xyxy(boxes) * factor, cxcywh_to_xyxy(targets.boxes) * factor
        )
        giou_terms = (1 - overlap) * box_weights
        normalizer = num_positives.clamp(min=1) + EPS
        weighted = {
            "loss_cls": (class_terms, self.class_weight),
            "loss_bbox": (bbox_terms, self.bbox_weight),
            "loss_giou": (giou_terms, self.giou_weight),
        }
        return {
            name: terms.expand(shape).sum((1, 2)) * weight / normalizer
            for name, (terms, weight) in weighted.items()
        }


class FocalLoss(nn.Module):
    """Sigmoid focal loss summed over classes (RetinaNet)."""

    uses_quality = False

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor, quality: Tensor | None = None) -> Tensor:
        """``logits (..., K)``, ``labels (...)`` in [0, K] (K = background) -> ``(...)``."""
        return in_parts(self._loss, logits, labels)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        target = _one_hot(labels, logits)
        return sigmoid_focal_loss(logits, target, self.alpha, self.gamma).sum(-1)


class QualityFocalLoss(nn.Module):
    """Focal loss whose target is the IoU of the predicted box, summed over classes.

    Source: Li et al., "Generalized Focal Loss", NeurIPS 2020, equation 5.
    """

    uses_quality = True

    def __init__(self, beta: float = 2.0):
        super().__init__()
        self.beta = beta

    def forward(self, logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
        """``logits (..., K)``, ``labels (...)``, ``quality (...)`` in [0, 1] -> ``(...)``."""
        return in_parts(self._loss, logits, labels, quality)

    def _loss(self, logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
        target = _one_hot(labels, logits, quality)
        distance = (target - logits.sigmoid()).abs()
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (entropy * distance**self.beta).sum(-1)


def _one_hot(labels: Tensor, logits: Tensor, values: Tensor | None = None) -> Tensor:
    """Targets like ``logits (..., K)``: 0 but for 1 (or ``values (...)``) at labels below K."""
    num_classes = logits.shape[-1]
    foreground = labels < num_classes
    at_label = foreground.to(logits.dtype) if values is None else foreground * values
    column = labels.clamp(max=num_classes - 1)[..., None]
    target = torch.zeros_like(logits, requires_grad=False)
    return target.scatter_(-1, column, at_label[..., None].to(logits.dtype))


def in_parts(loss: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    """``loss(logits, *others)`` of independent rows, in memory that does not grow with them.

    Beyond `MAX_LOGITS` elements the rows are split, no part keeps anything for the backward
    pass, and that computes every part again: what it takes is the gradient, which has the size of
    the logits.

    Args:
        loss: differentiable in its first argument, ``(n, K), (n,) .. -> (n,)``.
        logits: ``(..., K)``; others: ``(...)`` each, which get no gradient.
    """
    if logits.numel() <= MAX_LOGITS:
        return loss(logits, *others)
    rows = [logits.flatten(0, -2), *(other.flatten() for other in others)]
    num_rows = max(1, MAX_LOGITS // logits.shape[-1])
    return _InParts.apply(loss, num_rows, *rows).view(logits.shape[:-1])


class _InParts(torch.autograd.Function):
    """See `in_parts`."""

    @staticmethod
    def forward(ctx, loss, num_rows, logits, *others):
        ctx.loss, ctx.num_rows = loss, num_rows
        ctx.save_for_backward(logits, *others)
        parts = zip(*(tensor.split(num_rows) for tensor in (logits, *others)), strict=True)
        return torch.cat([loss(*part) for part in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, *others = ctx.saved_tensors
        result = torch.empty_like(logits)
        parts = zip(
            *(tensor.split(ctx.num_rows) for tensor in (result, grad, logits, *others)), strict=True
        )
        for into, grad_part, some, *rest in parts:
            with torch.enable_grad():
                some = some.detach().requires_grad_()
                (found,) = torch.autograd.grad(ctx.loss(some, *rest), some, grad_part)
            into.copy_(found)
        return None, None, result, *(None for _ in others)


def scale_gradient(values: Tensor, weights: Tensor) -> Tensor:
    """The values themselves, whose gradients are multiplied by weights.

    For losses of other people's making, which know no weights: sums over rows get the gradients
    of weighted sums, while what they report stays as it is.

    Args:
        values: ``(..., X)``; weights: ``(...)``, one for each row.
    """
    return _ScaleGradient.apply(values, weights[..., None])


class _ScaleGradient(torch.autograd.Function):
    """See `scale_gradient`."""

    @staticmethod
    def forward(ctx, values, weights):
        ctx.save_for_backward(weights)
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (weights,) = ctx.saved_tensors
        return grad * weights.to(grad.dtype), None


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """``(..., 4)`` center and size -> corners, in the unit of the input."""
    center, size = boxes.split(2, dim=-1)
    return torch.cat([center - 0.5 * size, center + 0.5 * size], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """``(..., 4)`` corners -> center and size, in the unit of the input."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def normalize_boxes(xyxy: Tensor, factor: Tensor) -> Tensor:
    """Absolute xyxy ``(..., 4)`` -> normalized cxcywh; ``factor`` is of `Geometry.factors`."""
    return xyxy_to_cxcywh(xyxy / factor.to(xyxy.dtype))


def generalized_iou(first: Tensor, second: Tensor) -> Tensor:
    """GIoU of corner boxes, broadcast over leading dimensions: ``(..., 4), (..., 4) -> (...)``.

    Areas are bounded below by 1e-6 as in the reference (mmdet ``bbox_overlaps``), so degenerate
    boxes give a number. No assertion looks at the values: that would stall a GPU each step.
    Source: Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019.
    """
    overlap, union = _overlap_and_union(first, second)
    hull = _area(
        torch.minimum(first[..., :2], second[..., :2]),
        torch.maximum(first[..., 2:], second[..., 2:]),
    ).clamp(min=1e-6)
    return overlap / union - (hull - union) / hull


def iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of corner boxes, broadcast: ``(..., 4), (..., 4) -> (...)``; see `generalized_iou`."""
    overlap, union = _overlap_and_union(first, second)
    return overlap / union


def _overlap_and_union(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    overlap = _area(
        torch.maximum(first[..., :2], second[..., :2]),
        torch.minimum(first[..., 2:], second[..., 2:]),
    )
    areas = [_product(box[..., 2:] - box[..., :2]) for box in (first, second)]
    return overlap, (areas[0] + areas[1] - overlap).clamp(min=1e-6)


def _area(low: Tensor, high: Tensor) -> Tensor:
    return _product((high - low).clamp(min=0))


def _product(size: Tensor) -> Tensor:
    """``(..., 2) -> (...)``. Not ``prod``, whose gradient asks the device for zeros and waits."""
    return size[..., 0] * size[..., 1]
