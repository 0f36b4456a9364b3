"""Learned queries without content: anchor boxes (DAB-DETR) or points (Conditional-DETR)."""

from __future__ import annotations

import torch
from torch import nn

from co_detr.modeling.queries.source import QuerySource
from co_detr.modeling.transformer import perceptron
from co_detr.structures import EncoderMemory, GroundTruth, QueryGroup


class AnchorQueries(QuerySource):
    """Learned anchor boxes; the decoder derives the positional queries from them.

    Anchors are learned as logits. Content starts at zero.
    Source: DAB-DETR section 4.2; its code without patterns and without fixed centres.
    """

    def __init__(self, *, num_queries: int, embed_dim: int, name: str = "matching"):
        super().__init__()
        self.name = name
        self.num_queries = num_queries
        self.embed_dim = embed_dim
        self.anchors = nn.Embedding(num_queries, 4)

    def forward(
        self, memory: EncoderMemory, ground_truth: list[GroundTruth] | None = None
    ) -> QueryGroup:
        """The group of ``num_queries`` one-to-one matched queries; the arguments give the batch."""
        batch = memory.tokens.shape[0]
        return QueryGroup(
            name=self.name,
            content=memory.tokens.new_zeros(batch, self.num_queries, self.embed_dim),
            position=None,
            reference=self.anchors.weight.sigmoid().expand(batch, -1, -1),
        )


class PointQueries(QuerySource):
    """Learned positional queries, and reference points that a perceptron reads from them.

    Content starts at zero. Reference boxes have the point as their centre and half the image's
    size, which is where the size predicted by a box head that is still zero starts, too.
    Source: Conditional-DETR section 3.2; ``ref_point_head`` of its code.
    """

    def __init__(self, *, num_queries: int, embed_dim: int, name: str = "matching"):
        super().__init__()
        self.name = name
        self.num_queries = num_queries
        self.position = nn.Embedding(num_queries, embed_dim)
        self.point_head = perceptron(embed_dim, 2)

    def forward(
        self, memory: EncoderMemory, ground_truth: list[GroundTruth] | None = None
    ) -> QueryGroup:
        """The group of ``num_queries`` one-to-one matched queries; the arguments give the batch."""
        batch = memory.tokens.shape[0]
        position = self.position.weight
        # Of their own, so that half precision does not move points by pixels.
        with torch.autocast(position.device.type, enabled=False):
            points = self.point_head(position).sigmoid()
        boxes = torch.cat([points, torch.full_like(points, 0.5)], dim=-1)
        return QueryGroup(
            name=self.name,
            content=memory.tokens.new_zeros(batch, *position.shape),
            position=position.expand(batch, -1, -1),
            reference=boxes.expand(batch, -1, -1),
        )
