"""Attention whose content and position have projections of their own (Conditional-DETR)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from co_detr.modeling.transformer import dropout_rate, split_heads
from co_detr.structures import EncoderMemory


class _ProjectedAttention(nn.Module):
    """The projections that self- and cross-attention have in common."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = nn.Dropout(dropout)
        self.query_content = nn.Linear(embed_dim, embed_dim)
        self.key_content = nn.Linear(embed_dim, embed_dim)
        self.key_position = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def _reset_parameters(self) -> None:
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """``(B, heads, Q or S, width)`` each -> ``(B, Q, C)``; mask: True = may attend."""
        mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout_rate(self.dropout))
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return split_heads(x, self.num_heads)


class ConditionalSelfAttention(_ProjectedAttention):
    """Attention among queries; content and position are projected apart, then added."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float):
        super().__init__(embed_dim, num_heads, dropout)
        self.query_position = nn.Linear(embed_dim, embed_dim)
        self._reset_parameters()

    def forward(self, content: Tensor, position: Tensor, attend_mask: Tensor | None) -> Tensor:
        """``content, position (B, Q, C)`` -> ``(B, Q, C)``, without residual."""
        query = self.query_content(content) + self.query_position(position)
        key = self.key_content(content) + self.key_position(position)
        query, key, value = (self._split(x) for x in (query, key, self.value(content)))
        return self._attend(query, key, value, attend_mask)


class ConditionalCrossAttention(_ProjectedAttention):
    """Attention to the memory; each head sees content and position side by side.

    A head's query is its part of the content query followed by its part of the spatial query, its
    key likewise, so their product is a content term plus a spatial term (Conditional-DETR
    section 3.3).

    Args:
        adds_position: also add positional query and key to the content parts; the code of
            Conditional-DETR does so in the first layer, where the content is still empty.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float, adds_position: bool):
        super().__init__(embed_dim, num_heads, dropout)
        self.query_spatial = nn.Linear(embed_dim, embed_dim)
        self.query_position = nn.Linear(embed_dim, embed_dim) if adds_position else None
        self._reset_parameters()

    def forward(
        self, content: Tensor, position: Tensor, spatial: Tensor, memory: EncoderMemory
    ) -> Tensor:
        """``content, position, spatial (B, Q, C)`` -> ``(B, Q, C)``, without residual."""
        query, key = self.query_and_key(content, position, spatial, memory)
        value = self._split(self.value(memory.tokens))
        return self._attend(query, key, value, ~memory.padding_mask[:, None, None])

    def query_and_key(
        self, content: Tensor, position: Tensor, spatial: Tensor, memory: EncoderMemory
    ) -> tuple[Tensor, Tensor]:
        """What is compared: ``(B, heads, Q, 2 C/heads)`` and ``(B, heads, S, 2 C/heads)``."""
        query = self.query_content(content)
        key = self.key_content(memory.tokens)
        key_position = self.key_position(memory.position)
        if self.query_position is not None:
            query = query + self.query_position(position)
            key = key + key_position
        query = torch.cat([self._split(query), self._split(self.query_spatial(spatial))], dim=-1)
        return query, torch.cat([self._split(key), self._split(key_position)], dim=-1)
