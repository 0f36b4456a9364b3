"""The one criterion that scores every query group, whoever assigned its targets."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from co_detr.modeling.boxes import cxcywh_to_xyxy, generalised_iou, iou, size_factor
from co_detr.structures import AssignedTargets, Predictions

# The reference divides by (normaliser + eps) in all its losses.
EPS = torch.finfo(torch.float32).eps


class FocalLoss(nn.Module):
    """Sigmoid focal loss summed over classes (RetinaNet)."""

    uses_quality = False

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor, quality: Tensor | None = None) -> Tensor:
        """``logits (..., K)``, ``labels (...)`` in [0, K] (K = background) -> ``(...)``."""
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
        target = _one_hot(labels, logits) * quality[..., None]
        distance = (target - logits.sigmoid()).abs()
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (entropy * distance**self.beta).sum(-1)


def _one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    num_classes = logits.shape[-1]
    return F.one_hot(labels, num_classes + 1)[..., :num_classes].to(logits.dtype)


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
        factor = torch.stack([size_factor(size, boxes) for size in image_sizes])[:, None]
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
