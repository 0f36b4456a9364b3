"""The one criterion that scores every query group, whoever assigned its targets."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from co_detr.modeling.geometry import cxcywh_to_xyxy, generalised_iou, iou, size_factors
from co_detr.structures import AssignedTargets, Predictions

# The reference divides by (normaliser + eps) in all its losses.
EPS = torch.finfo(torch.float32).eps


# Logits whose loss is computed at a time. Elementwise losses keep half a dozen tensors of the size
# of their input for the backward pass: nothing for 80 classes, gigabytes for the 1203 of LVIS.
MAX_LOGITS = 1 << 22


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
    rows = [logits.flatten(0, -2), *(each.flatten() for each in others)]
    num_rows = max(1, MAX_LOGITS // logits.shape[-1])
    return _InParts.apply(loss, num_rows, *rows).view(logits.shape[:-1])


class _InParts(torch.autograd.Function):
    """See `in_parts`."""

    @staticmethod
    def forward(ctx, loss, num_rows, logits, *others):
        ctx.loss, ctx.num_rows = loss, num_rows
        ctx.save_for_backward(logits, *others)
        parts = zip(*(each.split(num_rows) for each in (logits, *others)), strict=True)
        return torch.cat([loss(*part) for part in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, *others = ctx.saved_tensors
        result = torch.empty_like(logits)
        parts = zip(
            *(each.split(ctx.num_rows) for each in (result, grad, logits, *others)), strict=True
        )
        for into, grad_part, some, *rest in parts:
            with torch.enable_grad():
                some = some.detach().requires_grad_()
                (found,) = torch.autograd.grad(ctx.loss(some, *rest), some, grad_part)
            into.copy_(found)
        return None, None, result, *(None for _ in others)


class SetCriterion(nn.Module):
    """Classification, L1 and GIoU losses of all decoder layers at once.

    Every loss is a sum over the queries of the batch divided by the number of positives (as the
    caller averages it over processes, at least 1); background queries count in the
    classification loss only. L1 works on normalised boxes, GIoU on pixels.
    Source: DETR section 3.1, Deformable-DETR; mmdet ``loss_single``.

    Args:
        classification: ``FocalLoss`` or ``QualityFocalLoss``; the latter is told the (detached)
            IoU of every predicted box with its target, on normalised boxes as in the reference.
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
        image_sizes: list[tuple[int, int]],
        num_positives: Tensor,
    ) -> dict[str, Tensor]:
        """Scores one group.

        Args:
            predictions: of D layers.
            targets: of D layers or of one that all share.
            image_sizes: un-padded (height, width).
            num_positives: ``(D,)`` or ``(1,)`` normaliser.

        Returns:
            ``loss_cls``, ``loss_bbox`` and ``loss_giou``, each ``(D,)`` and weighted.
        """
        dtype = torch.promote_types(predictions.boxes.dtype, torch.float32)
        logits, boxes = predictions.logits.to(dtype), predictions.boxes.to(dtype)
        shape = logits.shape[:3]
        labels = targets.labels.expand(shape)
        box_weights = targets.weights * (targets.labels < self.num_classes)
        factor = size_factors(image_sizes, boxes)[:, None]
        quality = None
        if self.classification.uses_quality:
            quality = iou(
                cxcywh_to_xyxy(boxes.detach()), cxcywh_to_xyxy(targets.boxes.to(dtype))
            ).expand(shape)
        class_terms = self.classification(logits, labels, quality) * targets.weights
        bbox_terms = (boxes - targets.boxes).abs().sum(-1) * box_weights
        overlap = generalised_iou(
            cxcywh_to_xyxy(boxes) * factor, cxcywh_to_xyxy(targets.boxes) * factor
        )
        giou_terms = (1 - overlap) * box_weights
        normaliser = num_positives.clamp(min=1) + EPS
        weighted = {
            "loss_cls": (class_terms, self.class_weight),
            "loss_bbox": (bbox_terms, self.bbox_weight),
            "loss_giou": (giou_terms, self.giou_weight),
        }
        return {
            name: terms.expand(shape).sum((1, 2)) * weight / normaliser
            for name, (terms, weight) in weighted.items()
        }


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
