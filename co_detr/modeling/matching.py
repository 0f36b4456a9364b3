"""One-to-one assignment of ground truths to queries (DETR section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from co_detr.modeling.geometry import cxcywh_to_xyxy, generalised_iou, size_factor
from co_detr.structures import AssignedTargets, GroundTruth, Predictions
from co_detr.transfer import to_device


@dataclass(frozen=True)
class MatchingProblem:
    """Predictions of D layers and what they are matched to; ``num_classes`` labels background."""

    predictions: Predictions
    ground_truth: list[GroundTruth]
    num_classes: int


class HungarianAssigner(nn.Module):
    """Cheapest one-to-one assignment per image and decoder layer.

    The cost of a pair is ``class_weight`` times the difference of the focal terms,
    plus ``bbox_weight`` times the L1 distance of normalised boxes, minus ``giou_weight`` times
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
            per problem, targets with labels ``(D, B, Q)``, boxes ``(D, B, Q, 4)``, weights 1.
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
        factor = size_factor(truth.image_size, boxes)
        overlap = generalised_iou(
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
    for image, truth in enumerate(truths):
        labels[image, : len(truth.labels)] = truth.labels
        boxes[image, : len(truth.labels)] = truth.boxes.to(boxes.dtype)
    image_index = torch.arange(len(truths), device=matched.device)[None, :, None]
    row = matched.clamp(min=0)
    is_matched = matched >= 0
    return AssignedTargets(
        labels=torch.where(is_matched, labels[image_index, row], problem.num_classes),
        boxes=boxes[image_index, row],
        weights=boxes.new_ones(()).expand(is_matched.shape),
    )
