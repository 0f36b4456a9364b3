"""Losses of dense heads, each with the weights and normalisers of its paper.

The number of positives that losses are divided by counts at least one for each image. All
normalisers are averaged over processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from co_detr.modeling.auxiliary.box_codes import DeltaCode
from co_detr.modeling.auxiliary.dense import DensePredictions, DenseTargets, centreness_target
from co_detr.modeling.boxes import generalised_iou
from co_detr.modeling.criterion import EPS, FocalLoss, average_over_processes


@dataclass(frozen=True)
class Positives:
    """The P anchors of a batch that have a ground truth.

    Attributes:
        image, index: ``(P,)`` where they are in the ``(B, R)`` of predictions.
        anchors, boxes: ``(P, 4)`` absolute xyxy, the anchors and their ground truths.
        number: scalar, each image counting at least one.
    """

    image: Tensor
    index: Tensor
    anchors: Tensor
    boxes: Tensor
    number: Tensor

    @classmethod
    def of(cls, targets: DenseTargets, anchors: Tensor, num_classes: int) -> Positives:
        mask = targets.positive(num_classes)
        image, index = mask.nonzero(as_tuple=True)
        number = mask.sum(1).clamp(min=1).sum()
        return cls(image, index, anchors[index], targets.boxes[image, index], number)


def class_loss(
    loss: nn.Module, logits: Tensor, targets: DenseTargets, quality: Tensor | None = None
) -> Tensor:
    """Sum of ``loss`` over anchors that are trained."""
    labels = torch.where(targets.labels < 0, logits.shape[-1], targets.labels)
    return (loss(logits, labels, quality) * targets.counted).sum()


class CentrenessCriterion(nn.Module):
    """Focal loss, GIoU loss weighted by centreness, and binary cross-entropy of the centreness.

    The box loss is divided by the sum of its weights, at least 1, the others by the number of
    positives. Source: FCOS (ICCV 2019), which the defaults are of; ATSS (CVPR 2020), which weighs
    the boxes by 2.
    """

    has_quality = True
    quality_name = "loss_centreness"

    def __init__(
        self, class_weight: float = 1.0, box_weight: float = 1.0, quality_weight: float = 1.0
    ):
        super().__init__()
        self.class_weight = class_weight
        self.box_weight = box_weight
        self.quality_weight = quality_weight
        self.classification = FocalLoss()

    def quality(self, found: Positives, decoded: Tensor) -> Tensor:
        """``(P,)`` in [0, 1]; ``decoded`` are the predicted boxes ``(P, 4)``, without gradient."""
        return centreness_target(found.anchors, found.boxes)

    def forward(
        self,
        predictions: DensePredictions,
        anchors: Tensor,
        targets: DenseTargets,
        box_code: DeltaCode,
    ) -> dict[str, Tensor]:
        """Losses by name, weighted; ``anchors`` are the ``(R, 4)`` of all levels."""
        found = Positives.of(targets, anchors, predictions.logits.shape[-1])
        decoded = box_code.decode(predictions.deltas[found.image, found.index], found.anchors)
        quality = self.quality(found, decoded.detach()).to(predictions.quality.dtype)
        counts = torch.stack([found.number.to(quality.dtype), quality.sum()])
        num_positives, quality_sum = average_over_processes(counts)
        overlap = generalised_iou(decoded, found.boxes)
        quality_loss = F.binary_cross_entropy_with_logits(
            predictions.quality[found.image, found.index], quality, reduction="sum"
        )
        class_sum = class_loss(self.classification, predictions.logits, targets)
        return {
            "loss_cls": self.class_weight * class_sum / (num_positives + EPS),
            "loss_bbox": self.box_weight
            * ((1 - overlap) * quality).sum()
            / quality_sum.clamp(min=1),
            self.quality_name: self.quality_weight * quality_loss / (num_positives + EPS),
        }
