"""Contrastive denoising: noised ground truths as queries that have to find their way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from co_detr.errors import require_whole
from co_detr.modeling.losses import cxcywh_to_xyxy, xyxy_to_cxcywh
from co_detr.modeling.queries.sources import QuerySource
from co_detr.modeling.transformer import inverse_sigmoid
from co_detr.structures import (
    AssignedTargets,
    ClassRows,
    EncoderMemory,
    GroundTruth,
    QueryGroup,
    StepCounts,
)


@dataclass(frozen=True)
class NoiseDraws:
    """Random numbers of one step, for N noised boxes in slot order.

    Attributes:
        flip: ``(N,)`` uniform in [0, 1): labels below half of the label noise are replaced ...
        labels: ``(N,)`` int64 in [0, K): ... by these.
        signs: ``(N, 4)``, -1 or 1: direction in which every side of a box moves.
        shifts: ``(N, 4)`` uniform in [0, 1): how far, in halves of the box's extent.
    """

    flip: Tensor
    labels: Tensor
    signs: Tensor
    shifts: Tensor


class DenoisingQueries(QuerySource):
    """Groups of noised ground truths; each block has positives and harder negatives.

    1. With G the most ground truths of an image of the step, there are ``num_queries // G`` blocks
       (at least one) of 2 G slots: a positive and a negative for every ground truth. Images with
       fewer ground truths leave slots empty; these are trained as background.
    2. A label is replaced by a random one with probability ``label_noise / 2``. Every side of a
       box moves by up to half of the box's extent times ``box_noise``, a negative's by one to
       two times that.
    3. Content queries are label embeddings. Blocks do not see each other, but all see the
       matched queries, which see none of them.

    Positives are to give back the ground truth, negatives are background.
    Source: DINO section 3.3; the reference's ``CdnQueryGenerator``.

    Args:
        num_classes: K.
        embed_dim: width C of the content queries.
        num_queries: positives of an image over all blocks, about; 100 in DINO.
        label_noise: twice the probability that a label is replaced.
        box_noise: factor of the largest shift of a positive's side, half of the box's extent.
        eps: bound of the inverse sigmoid on noised boxes.
        sees: name of the group of matched queries.

    Raises:
        ConfigError: if ``num_queries`` is no whole number of at least 1.
    """

    name = "denoising"
    class_layers = {"label_embedding": ClassRows()}
    training_only = True

    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int,
        num_queries: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        eps: float = 1e-3,
        sees: str = "matching",
    ):
        super().__init__()
        require_whole("model.queries.denoising.num_queries", num_queries)
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.label_noise = label_noise
        self.box_noise = box_noise
        self.eps = eps
        self.sees = sees
        self.label_embedding = nn.Embedding(num_classes, embed_dim)

    def training_groups(
        self,
        memory: EncoderMemory,
        ground_truth: list[GroundTruth],
        counts: StepCounts | None = None,
    ) -> list[QueryGroup]:
        """The one group."""
        return [self(memory, ground_truth, counts)]

    def forward(
        self,
        memory: EncoderMemory,
        ground_truth: list[GroundTruth],
        counts: StepCounts | None = None,
    ) -> QueryGroup:
        """Makes the group: content ``(B, Q, C)``, reference ``(B, Q, 4)``, Q = 2 G x blocks.

        It has no queries at all if no image of the step has a ground truth.
        """
        num_truths = counts.num_truths if counts else [len(truth.labels) for truth in ground_truth]
        longest = max(num_truths)
        num_blocks = max(1, self.num_queries // longest) if longest else 1
        # (B, G), (B, G, 4), (B, G), (B, G)
        labels, boxes, is_real, weights = _pad(ground_truth, longest)
        # (B, blocks, positive or negative, G)
        slots = (num_blocks, 2, longest)
        labels, is_real, weights = (
            x[:, None, None].expand(-1, *slots) for x in (labels, is_real, weights)
        )
        boxes = boxes[:, None, None].expand(-1, *slots, 4)
        is_positive = torch.zeros_like(is_real)
        is_positive[:, :, 0] = is_real[:, :, 0]

        draws = self.draw(boxes.flatten(0, -2))
        draws = NoiseDraws(*(x.view(*is_real.shape, *x.shape[1:]) for x in vars(draws).values()))
        noised_labels = torch.where(draws.flip < 0.5 * self.label_noise, draws.labels, labels)
        content = self.label_embedding(noised_labels) * is_real[..., None]
        # An empty slot is a box in the middle of the image (logit 0).
        logits = inverse_sigmoid(self._noised(boxes, draws), self.eps) * is_real[..., None]
        targets = AssignedTargets(
            labels=torch.where(is_positive, labels, self.num_classes).flatten(1)[None],
            boxes=(boxes * is_positive[..., None]).flatten(1, 3)[None],
            weights=torch.where(is_positive, weights, 1.0).flatten(1)[None],
        )
        return QueryGroup(
            name=self.name,
            content=content.flatten(1, 3).to(memory.tokens.dtype),
            position=None,
            reference=logits.sigmoid().flatten(1, 3),
            targets=targets,
            num_positives=num_blocks * sum(num_truths),
            num_blocks=num_blocks,
            sees=(self.sees,),
        )

    def draw(self, boxes: Tensor) -> NoiseDraws:
        """Draws for boxes ``(N, 4)``; replaceable, so that recorded numbers can be fed."""
        return NoiseDraws(
            flip=torch.rand_like(boxes[:, 0]),
            labels=torch.randint(self.num_classes, boxes.shape[:1], device=boxes.device),
            signs=torch.randint(2, boxes.shape, device=boxes.device).to(boxes.dtype) * 2 - 1,
            shifts=torch.rand_like(boxes),
        )

    def _noised(self, boxes: Tensor, draws: NoiseDraws) -> Tensor:
        """Boxes ``(B, blocks, 2, G, 4)`` cxcywh with their sides moved; sides may cross."""
        shifts = draws.shifts.clone()
        shifts[:, :, 1] += 1.0  # negatives
        half_extent = boxes[..., 2:].repeat(1, 1, 1, 1, 2) / 2
        corners = cxcywh_to_xyxy(boxes) + draws.signs * shifts * half_extent * self.box_noise
        return xyxy_to_cxcywh(corners.clamp(0.0, 1.0))


def _pad(ground_truth: list[GroundTruth], length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels ``(B, G)``, boxes ``(B, G, 4)``, which of them are real ``(B, G)`` bool, and their
    weights ``(B, G)``.
    """
    first = ground_truth[0]
    labels = first.labels.new_zeros(len(ground_truth), length)
    boxes = first.boxes.new_zeros(len(ground_truth), length, 4)
    is_real = torch.zeros_like(labels, dtype=torch.bool)
    weights = torch.ones_like(boxes[..., 0])
    for image, truth in enumerate(ground_truth):
        count = len(truth.labels)
        labels[image, :count], boxes[image, :count] = truth.labels, truth.boxes
        is_real[image, :count] = True
        if truth.weights is not None:
            weights[image, :count] = truth.weights.to(weights.dtype)
    return labels, boxes, is_real, weights
