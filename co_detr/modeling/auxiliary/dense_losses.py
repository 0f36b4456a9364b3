"""What dense heads learn: targets and predictions of anchors, codes of boxes, and losses.

The number of positives that losses are divided by counts at least one for each image. All
normalizers are averaged over processes. ``counts`` gives what they are made of, and ``totals`` of a
loss is the sum of these over all micro-batches of an optimizer step (None: this batch is all of
it). ``counts_predictions`` says whether ``counts`` reads predictions, which may else be None.
``has_quality`` says whether the head has to predict the quality of its boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from torch import Tensor, nn

from co_detr.modeling.losses import (
    EPS,
    FocalLoss,
    QualityFocalLoss,
    average_over_processes,
    generalized_iou,
    iou,
    scale_gradient,
)


@dataclass(frozen=True)
class DenseTargets:
    """Assignment of all R anchors of B images.

    Attributes:
        labels: ``(B, R)`` in [0, K]; K is background, also for anchors in the padding; -1 for
            anchors that are ignored.
        boxes: ``(B, R, 4)`` absolute xyxy ground truth; zeros where there is none.
        inside: ``(B, R)`` bool, False for anchors whose cell lies in the batch padding.
        truths: ``(B, R)`` index of the ground truth in its image, negative where there is none.
    """

    labels: Tensor
    boxes: Tensor
    inside: Tensor
    truths: Tensor

    @property
    def counted(self) -> Tensor:
        """``(B, R)`` bool: anchors that are trained, as foreground or as background."""
        return self.inside & (self.labels >= 0)

    def positive(self, num_classes: int) -> Tensor:
        """``(B, R)`` bool: anchors with a ground truth."""
        return (self.labels >= 0) & (self.labels < num_classes)


@dataclass(frozen=True)
class DensePredictions:
    """Outputs per anchor.

    Attributes:
        logits: ``(B, R, K)`` of the classes.
        deltas: ``(B, R, X)``, boxes in the head's box code.
        quality: ``(B, R)`` logit of how good the box is (centerness, IoU); None where the head
            predicts no such thing.
    """

    logits: Tensor
    deltas: Tensor
    quality: Tensor | None = None

    @property
    def num_classes(self) -> int:
        return self.logits.shape[-1]

    def with_scaled_gradients(self, weights: Tensor) -> DensePredictions:
        """The same, with gradients that are multiplied by those ``(B, R)`` of the anchors."""
        return DensePredictions(
            scale_gradient(self.logits, weights),
            scale_gradient(self.deltas, weights),
            None
            if self.quality is None
            else scale_gradient(self.quality[..., None], weights).squeeze(-1),
        )

    @classmethod
    def of_levels(
        cls, logits: list[Tensor], deltas: list[Tensor], quality: list[Tensor] = ()
    ) -> DensePredictions:
        """Joins rows ``(B, R_l, ...)`` of levels, in float32 at least."""
        dtype = torch.promote_types(logits[0].dtype, torch.float32)
        joined = torch.cat(quality, 1).squeeze(-1).to(dtype) if quality else None
        return cls(torch.cat(logits, 1).to(dtype), torch.cat(deltas, 1).to(dtype), joined)


@dataclass(frozen=True)
class Positives:
    """The P anchors of a batch that have a ground truth.

    Attributes:
        image, index: ``(P,)`` where they are in the ``(B, R)`` of predictions.
        anchors, boxes: ``(P, 4)`` absolute xyxy, the anchors and their ground truths.
        number: how many they are, each image counting at least one.
    """

    image: Tensor
    index: Tensor
    anchors: Tensor
    boxes: Tensor
    number: Tensor

    def pick(self, values: Tensor) -> Tensor:
        """The P rows of ``(B, R, ...)``."""
        return values[self.image, self.index]

    @classmethod
    def of(cls, targets: DenseTargets, anchors: Tensor, num_classes: int) -> Positives:
        """Finds them; ``anchors`` are the ``(R, 4)`` of all levels."""
        mask = targets.positive(num_classes)
        image, index = mask.nonzero(as_tuple=True)
        number = mask.sum(1).clamp(min=1).sum()
        return cls(image, index, anchors[index], targets.boxes[image, index], number)


class BoxCode(Protocol):
    """A code of ``num_outputs`` (X) network outputs per anchor; boxes are absolute xyxy."""

    num_outputs: int

    def decode(self, outputs: Tensor, anchors: Tensor) -> Tensor:
        """Outputs ``(N, X)`` at anchors ``(N, 4)`` -> boxes ``(N, 4)``."""

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Boxes ``(N, 4)`` at anchors ``(N, 4)`` -> what is regressed, ``(N, 4)``."""


class DeltaCode:
    """Shift of the center and log ratio of the sides (R-CNN): Detectron2's ``Box2BoxTransform``."""

    num_outputs = 4

    def __init__(self, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)):
        self.transform = Box2BoxTransform(weights=tuple(weights))

    def decode(self, outputs: Tensor, anchors: Tensor) -> Tensor:
        return decode_deltas(self.transform, outputs, anchors)

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        return self.transform.get_deltas(anchors, boxes)


class DistanceCode:
    """Distances from the anchor's center to the four sides, in sides of the (square) anchor.

    Detectron2's ``Box2BoxTransformLinear``: negative distances count as 0. Source: FCOS.
    """

    num_outputs = 4

    def __init__(self):
        self.transform = Box2BoxTransformLinear(normalize_by_size=True)

    def decode(self, outputs: Tensor, anchors: Tensor) -> Tensor:
        return self.transform.apply_deltas(outputs, anchors)

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        return self.transform.get_deltas(anchors, boxes)


class DistributionCode:
    """A distribution over the distance to each side: logits of 0, 1, ... ``max_distance`` strides.

    The distance is the mean of the distribution. Source: Li et al., "Generalized Focal Loss",
    NeurIPS 2020, section 3.3.

    Args:
        anchor_scale: side of the anchors in strides.
    """

    def __init__(self, max_distance: int = 16, anchor_scale: float = 8.0):
        self.max_distance = max_distance
        self.anchor_scale = anchor_scale
        self.num_outputs = 4 * (max_distance + 1)
        self.distances = DistanceCode()

    def decode(self, outputs: Tensor, anchors: Tensor) -> Tensor:
        shares = outputs.unflatten(1, (4, -1)).softmax(-1)  # (N, 4, max_distance + 1)
        strides = torch.arange(shares.shape[-1], device=shares.device, dtype=shares.dtype)
        # A product with a vector would run in half precision under autocast.
        return self.distances.decode((shares * strides).sum(-1) / self.anchor_scale, anchors)

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """In strides, not bounded."""
        return self.distances.encode(boxes, anchors) * self.anchor_scale


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


class CenternessCriterion(nn.Module):
    """Focal loss, GIoU loss weighted by centerness, and binary cross-entropy of the centerness.

    The box loss is divided by the sum of its weights, at least 1, the others by the number of
    positives. Source: FCOS (ICCV 2019), which the defaults are of; ATSS (CVPR 2020), which weighs
    the boxes by 2.
    """

    has_quality = True
    counts_predictions = False
    quality_name = "loss_centerness"

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
        return centerness_target(found.anchors, found.boxes)

    @torch.no_grad()
    def counts(
        self, found: Positives, predictions: DensePredictions | None, box_code: BoxCode
    ) -> Tensor:
        """``(2,)``: number of positives, and sum of their qualities."""
        return _number_and_sum(found, centerness_target(found.anchors, found.boxes))

    def forward(
        self,
        predictions: DensePredictions,
        anchors: Tensor,
        targets: DenseTargets,
        box_code: BoxCode,
        totals: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses by name, weighted; ``anchors`` are the ``(R, 4)`` of all levels."""
        found = Positives.of(targets, anchors, predictions.num_classes)
        decoded = box_code.decode(found.pick(predictions.deltas), found.anchors)
        quality = self.quality(found, decoded.detach()).to(predictions.quality.dtype)
        quality_loss = F.binary_cross_entropy_with_logits(
            found.pick(predictions.quality), quality, reduction="sum"
        )
        totals = _number_and_sum(found, quality) if totals is None else totals.to(quality.dtype)
        class_sum = _class_sum(self.classification, predictions.logits, targets)
        overlap = generalized_iou(decoded, found.boxes)
        num_positives, quality_sum = average_over_processes(totals)
        return {
            "loss_cls": self.class_weight * class_sum / (num_positives + EPS),
            "loss_bbox": self.box_weight * _weighted_mean(1 - overlap, quality, quality_sum),
            self.quality_name: self.quality_weight * quality_loss / (num_positives + EPS),
        }


def centerness_target(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Centerness of anchor centers in their boxes, ``(N, 4), (N, 4)`` xyxy -> ``(N,)`` in (0, 1].

    Source: FCOS equation 3.
    """
    center = (anchors[:, :2] + anchors[:, 2:]) / 2
    low, high = center - boxes[:, :2], boxes[:, 2:] - center
    ratio = torch.minimum(low, high) / torch.maximum(low, high)
    return (ratio[:, 0] * ratio[:, 1]).sqrt()


class IoUCriterion(CenternessCriterion):
    """As `CenternessCriterion`, with the IoU of the predicted box in place of the centerness.

    Source: PAA (ECCV 2020), section 3.2 and 4.
    """

    counts_predictions = True
    quality_name = "loss_iou"

    def __init__(
        self, class_weight: float = 1.0, box_weight: float = 1.3, quality_weight: float = 0.5
    ):
        super().__init__(class_weight, box_weight, quality_weight)

    def quality(self, found: Positives, decoded: Tensor) -> Tensor:
        return iou(decoded, found.boxes)

    @torch.no_grad()
    def counts(
        self, found: Positives, predictions: DensePredictions | None, box_code: BoxCode
    ) -> Tensor:
        """``(2,)``: number of positives, and sum of their qualities."""
        decoded = box_code.decode(found.pick(predictions.deltas), found.anchors)
        return _number_and_sum(found, self.quality(found, decoded))

    @torch.no_grad()
    def costs(
        self,
        predictions: DensePredictions,
        anchors: Tensor,
        targets: DenseTargets,
        box_code: BoxCode,
    ) -> Tensor:
        """``(P,)`` classification and box loss of every anchor that has a ground truth."""
        found = Positives.of(targets, anchors, predictions.num_classes)
        decoded = box_code.decode(found.pick(predictions.deltas), found.anchors)
        classes = self.classification(found.pick(predictions.logits), found.pick(targets.labels))
        boxes = 1 - generalized_iou(decoded, found.boxes)
        return self.class_weight * classes + self.box_weight * boxes


class SmoothL1Criterion(nn.Module):
    """Focal loss and smooth L1 loss of the box code, both divided by the number of positives.

    Source: RetinaNet (ICCV 2017), section 4; ``beta`` is Detectron2's.
    """

    has_quality = False
    counts_predictions = False

    def __init__(self, class_weight: float = 1.0, box_weight: float = 1.0, beta: float = 0.1):
        super().__init__()
        self.class_weight = class_weight
        self.box_weight = box_weight
        self.beta = beta
        self.classification = FocalLoss()

    @torch.no_grad()
    def counts(
        self, found: Positives, predictions: DensePredictions | None, box_code: BoxCode
    ) -> Tensor:
        """``(1,)``: number of positives."""
        return found.number.to(found.anchors.dtype)[None]

    def forward(
        self,
        predictions: DensePredictions,
        anchors: Tensor,
        targets: DenseTargets,
        box_code: BoxCode,
        totals: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses by name, weighted; ``anchors`` are the ``(R, 4)`` of all levels."""
        found = Positives.of(targets, anchors, predictions.num_classes)
        deltas = found.pick(predictions.deltas)
        goals = box_code.encode(found.boxes, found.anchors).to(deltas.dtype)
        totals = found.number[None] if totals is None else totals
        (num_positives,) = average_over_processes(totals.to(deltas.dtype))
        class_sum = _class_sum(self.classification, predictions.logits, targets)
        box_sum = F.smooth_l1_loss(deltas, goals, reduction="sum", beta=self.beta)
        return {
            "loss_cls": self.class_weight * class_sum / (num_positives + EPS),
            "loss_bbox": self.box_weight * box_sum / (num_positives + EPS),
        }


class DistributionCriterion(nn.Module):
    """Quality focal loss, GIoU loss and distribution focal loss, for `DistributionCode`.

    The class target is the IoU of the predicted box. Both box losses are weighted by the best class
    score of the anchor and divided by the sum of these weights, at least 1.
    Source: Li et al., "Generalized Focal Loss", NeurIPS 2020, equations 5 to 8.
    """

    has_quality = False
    counts_predictions = True

    def __init__(
        self, class_weight: float = 1.0, box_weight: float = 2.0, distribution_weight: float = 0.25
    ):
        super().__init__()
        self.class_weight = class_weight
        self.box_weight = box_weight
        self.distribution_weight = distribution_weight
        self.classification = QualityFocalLoss(beta=2.0)

    @torch.no_grad()
    def counts(
        self, found: Positives, predictions: DensePredictions | None, box_code: BoxCode
    ) -> Tensor:
        """``(2,)``: number of positives, and sum of their best class scores."""
        return _number_and_sum(found, _best_scores(found.pick(predictions.logits)))

    def forward(
        self,
        predictions: DensePredictions,
        anchors: Tensor,
        targets: DenseTargets,
        box_code: BoxCode,
        totals: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses by name, weighted; ``anchors`` are the ``(R, 4)`` of all levels."""
        logits = predictions.logits
        found = Positives.of(targets, anchors, predictions.num_classes)
        outputs = found.pick(predictions.deltas)  # (P, 4 * bins)
        decoded = box_code.decode(outputs, found.anchors)
        quality = logits.new_zeros(logits.shape[:2])
        quality[found.image, found.index] = iou(decoded.detach(), found.boxes).to(logits.dtype)
        weights = _best_scores(found.pick(logits))
        totals = _number_and_sum(found, weights) if totals is None else totals
        num_positives, weight_sum = average_over_processes(totals)
        overlap = generalized_iou(decoded, found.boxes)
        distances = box_code.encode(found.boxes, found.anchors)
        by_side = distribution_focal_loss(outputs.unflatten(1, (4, -1)), distances)
        class_sum = _class_sum(self.classification, logits, targets, quality)
        return {
            "loss_cls": self.class_weight * class_sum / (num_positives + EPS),
            "loss_bbox": self.box_weight * _weighted_mean(1 - overlap, weights, weight_sum),
            "loss_dfl": self.distribution_weight
            * _weighted_mean(by_side.mean(-1), weights, weight_sum),
        }


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Cross-entropies of the two bins beside a distance, weighted by how near each is.

    Args:
        logits: ``(..., N)`` of the distances 0, 1, ... N - 1.
        distances: ``(...)``; those that no two bins enclose are moved to the nearest ones.
    """
    last = logits.shape[-1] - 1
    distances = distances.clamp(0, last).to(logits.dtype)
    left = distances.floor().clamp(max=last - 1)
    log_shares = logits.log_softmax(-1)
    beside = torch.stack([left, left + 1], dim=-1).long()
    nearness = torch.stack([left + 1 - distances, distances - left], dim=-1)
    return -(log_shares.gather(-1, beside) * nearness).sum(-1)


def _number_and_sum(found: Positives, weights: Tensor) -> Tensor:
    """``(2,)`` number of positives, and sum of their weights ``(P,)``."""
    return torch.stack([found.number.to(weights.dtype), weights.sum()])


def _best_scores(logits: Tensor) -> Tensor:
    """Class logits ``(P, K)`` -> ``(P,)`` in [0, 1], without gradient."""
    return logits.detach().sigmoid().amax(-1)


def _weighted_mean(losses: Tensor, weights: Tensor, weight_sum: Tensor) -> Tensor:
    """``weight_sum`` is the one averaged over processes; it counts at least 1."""
    return (losses * weights).sum() / weight_sum.clamp(min=1)


def _class_sum(
    loss: nn.Module, logits: Tensor, targets: DenseTargets, quality: Tensor | None = None
) -> Tensor:
    """Sum of ``loss`` over the anchors that are trained."""
    labels = torch.where(targets.labels < 0, logits.shape[-1], targets.labels)
    counted = targets.counted
    return (loss(logits, labels, quality) * counted).sum()
