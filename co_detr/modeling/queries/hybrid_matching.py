"""Hybrid matching: beside the matched queries, more of them for repeated ground truths."""

from __future__ import annotations

from typing import Literal

from torch import nn

from co_detr.modeling.queries.two_stage import TwoStageQueries
from co_detr.structures import EncoderMemory, GroundTruth, QueryGroup, StepCounts


class HybridMatchingQueries(TwoStageQueries):
    """Two-stage queries with a second, training-only group that is matched one-to-many.

    1. The best ``num_queries`` proposals are the one-to-one group of inference.
    2. The next ``num_extra`` ones are a group of their own in training. Every ground truth is
       repeated ``repeats`` times before its Hungarian matching.

    Both groups share the proposals and the code of their positions, are blind to each other, and
    have learned content queries of their own.
    Source: Jia et al., "DETRs with Hybrid Matching", CVPR 2023, section 3.2 (hybrid branch).

    Args:
        num_extra: queries of the one-to-many group, T in the paper.
        repeats: queries that each ground truth is matched to, K in the paper.
        loss_weight: of the one-to-many group, lambda in the paper.

    Further arguments are those of `TwoStageQueries`.
    """

    training_modules = ("extra_content",)
    _lowered = "num_extra"

    def __init__(
        self,
        *,
        num_queries: int,
        num_classes: int,
        embed_dim: int,
        ranking: Literal["first_class", "best_class"] = "first_class",
        with_position: bool = True,
        with_features: bool = False,
        name: str = "matching",
        num_extra: int = 1500,
        repeats: int = 6,
        loss_weight: float = 1.0,
    ):
        super().__init__(
            num_queries=num_queries,
            num_classes=num_classes,
            embed_dim=embed_dim,
            ranking=ranking,
            with_position=with_position,
            with_features=with_features,
            name=name,
        )
        self.repeats = repeats
        self.loss_weight = loss_weight
        self.extra_content: nn.Embedding | None = nn.Embedding(num_extra, embed_dim)

    def training_groups(
        self,
        memory: EncoderMemory,
        ground_truth: list[GroundTruth],
        counts: StepCounts | None = None,
    ) -> list[QueryGroup]:
        """The one-to-one group, and the one-to-many group ``one_to_many``.

        Raises:
            ConfigError: if the image batch has fewer tokens than both groups have queries.
        """
        if self.extra_content is None:
            return super().training_groups(memory, ground_truth)
        ranked = self._rank(memory, self.num_queries + self.extra_content.num_embeddings)
        tokens = ranked.best[:, self.num_queries :]
        reference = ranked.references(self.num_queries, ranked.best.shape[1])
        one_to_many = QueryGroup(
            name="one_to_many",
            content=self._content(self.extra_content, memory, tokens),
            position=self._position(reference) if self.with_position else None,
            reference=reference,
            truth_repeats=self.repeats,
            loss_weight=self.loss_weight,
            tokens=tokens,
        )
        return [self._matched_group(memory, ranked), one_to_many]
