"""Learned queries: the same ones for every image (single-stage Deformable-DETR)."""

from __future__ import annotations

import torch
from torch import nn

from co_detr.modeling.queries.source import QuerySource
from co_detr.structures import EncoderMemory, GroundTruth, QueryGroup


class LearnedQueries(QuerySource):
    """Learned content and positional queries; a linear layer of the latter gives the points.

    Source: Deformable-DETR section 4.1 (decoder), whose reference points are predicted from the
    query embedding.

    Args:
        num_queries: Q; embed_dim: width C.
        training_only: for further groups beside the one of inference (Group-DETR).
    """

    def __init__(
        self,
        *,
        num_queries: int,
        embed_dim: int,
        name: str = "matching",
        training_only: bool = False,
    ):
        super().__init__()
        self.num_queries = num_queries
        self.name = name
        self.training_only = training_only
        self.content = nn.Embedding(num_queries, embed_dim)
        self.position = nn.Embedding(num_queries, embed_dim)
        self.reference_points = nn.Linear(embed_dim, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(
        self, memory: EncoderMemory, ground_truth: list[GroundTruth] | None = None
    ) -> QueryGroup:
        """Makes the group; its reference points ``(B, Q, 2)`` keep their gradient."""
        batch = memory.tokens.shape[0]
        position = self.position.weight
        # Of their own, so that half precision does not move points by pixels.
        with torch.autocast(position.device.type, enabled=False):
            points = self.reference_points(position).sigmoid()
        return QueryGroup(
            name=self.name,
            content=self.content.weight.expand(batch, -1, -1),
            position=position.expand(batch, -1, -1),
            reference=points.expand(batch, -1, -1),
        )
