"""Blocks that encoder and decoder share: self-attention, feed-forward, box head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from co_detr.errors import ConfigError


class SelfAttention(nn.Module):
    """Multi-head attention among queries through ``scaled_dot_product_attention``.

    The position is added to queries and keys, not to values (DETR). ``nn.MultiheadAttention``
    is not used: its mask has the opposite sense and is copied once per head.

    Args:
        dropout: in training, probability that an attention weight counts as 0.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        if embed_dim % num_heads:
            raise ConfigError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}.")
        self.num_heads = num_heads
        self.dropout = nn.Dropout(dropout)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, content: Tensor, position: Tensor, attend_mask: Tensor | None) -> Tensor:
        """Attends among Q queries.

        Args:
            content, position: ``(B, Q, C)``.
            attend_mask: bool, broadcastable to ``(B, heads, Q, Q)``, True = may attend.

        Returns:
            ``(B, Q, C)``, without residual.
        """
        channels = content.shape[-1]
        query_key = F.linear(
            content + position,
            self.in_proj_weight[: 2 * channels],
            self.in_proj_bias[: 2 * channels],
        )
        value = F.linear(
            content, self.in_proj_weight[2 * channels :], self.in_proj_bias[2 * channels :]
        )
        query, key = query_key.chunk(2, dim=-1)
        query, key, value = (split_heads(x, self.num_heads) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attend_mask, dropout_p=dropout_rate(self.dropout)
        )
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


def dropout_rate(dropout: nn.Dropout) -> float:
    """What a functional dropout takes: the rate of a module that eval mode switches off.

    A module of its own can be told from the rest of a model that is in training mode, as the
    validation loss does.
    """
    return dropout.p if dropout.training else 0.0


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``(B, Q, C)`` -> ``(B, heads, Q, C/heads)``."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers, ``(..., C) -> (..., C)``, without residual.

    Args:
        activation: between them; None: ReLU.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        dropout: float = 0.0,
        activation: nn.Module | None = None,
    ):
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, embed_dim)
        # In place: the hidden activations are the largest tensor of a layer.
        self.activation = activation or nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class BoxHead(nn.Module):
    """Three-layer perceptron from a query to four box offsets in logit space.

    The last layer starts at zero, so that boxes start at their references.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Linear(embed_dim, embed_dim),
                nn.Linear(embed_dim, embed_dim),
                nn.Linear(embed_dim, 4),
            ]
        )
        nn.init.zeros_(self.layers[2].weight)
        nn.init.zeros_(self.layers[2].bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C) -> (..., 4)``, always float32 or wider: it is added to box logits."""
        for layer in self.layers[:2]:
            x = F.relu(layer(x))
        x = self.layers[2](x)
        return x if x.dtype == torch.float64 else x.float()


def class_head(embed_dim: int, num_classes: int) -> nn.Linear:
    """Linear class head whose bias starts every class at probability 0.01 (focal loss paper)."""
    head = nn.Linear(embed_dim, num_classes)
    nn.init.constant_(head.bias, -4.595119850134589)  # -log((1 - 0.01) / 0.01)
    return head
