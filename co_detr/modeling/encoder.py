"""Deformable encoder: multi-scale maps in, ``EncoderMemory`` out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from co_detr.errors import ConfigError
from co_detr.layers import MultiScaleDeformableAttention
from co_detr.modeling.geometry import reference_points, shrink_mask, valid_ratios
from co_detr.modeling.transformer_layers import FeedForward
from co_detr.structures import EncoderMemory


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then feed-forward; post-norm."""

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        feedforward_dim: int,
        dropout: float,
    ):
        super().__init__()
        self.attention = MultiScaleDeformableAttention(embed_dim, num_heads, num_levels, num_points)
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, feedforward_dim, dropout)
        self.ffn_norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        reference: Tensor,
        level_shapes: list[tuple[int, int]],
        padding_mask: Tensor,
    ) -> Tensor:
        """``tokens, position (B, S, C)``, ``reference (B, S, L, 2)`` -> ``(B, S, C)``."""
        attended = self.attention(tokens + position, tokens, reference, level_shapes, padding_mask)
        tokens = self.attention_norm(tokens + self.dropout(attended))
        return self.ffn_norm(tokens + self.dropout(self.ffn(tokens)))


class DeformableEncoder(nn.Module):
    """Stack of deformable layers over the flattened levels (Deformable-DETR section 4.1).

    Args:
        position_encoding: `SinePosition`.
        num_layers: layers; the arguments that follow describe one of them.
        activation_checkpointing: in training, keep only the input of every layer and compute the
            layer again in the backward pass: less memory, about a quarter more time.
        strides: of the maps in pixels, finest first. With them, the size of an image is measured in
            fractions of a cell; None: in the cells that hold a part of it, as in the reference. See
            `valid_ratios`.

    Raises:
        ConfigError: if there are not as many ``strides`` as levels.
    """

    def __init__(
        self,
        *,
        position_encoding: nn.Module,
        num_layers: int = 6,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        feedforward_dim: int = 2048,
        dropout: float = 0.0,
        activation_checkpointing: bool = False,
        strides: Sequence[int] | None = None,
    ):
        super().__init__()
        if strides is not None and len(strides) != num_levels:
            raise ConfigError(
                f"model.encoder.strides={list(strides)} must name one stride for each of the "
                f"{num_levels} levels, or be null."
            )
        self.position_encoding = position_encoding
        self.activation_checkpointing = activation_checkpointing
        self.strides = strides
        self.level_embed = nn.Parameter(torch.empty(num_levels, embed_dim))
        nn.init.normal_(self.level_embed)
        self.layers = nn.ModuleList(
            [
                DeformableEncoderLayer(
                    embed_dim=embed_dim,
                    num_heads=num_heads,
                    num_levels=num_levels,
                    num_points=num_points,
                    feedforward_dim=feedforward_dim,
                    dropout=dropout,
                )
                for _ in range(num_layers)
            ]
        )

    @property
    def num_levels(self) -> int:
        return self.level_embed.shape[0]

    def forward(
        self, maps: list[Tensor], padding_mask: Tensor, image_sizes: list[tuple[int, int]]
    ) -> EncoderMemory:
        """Encodes one batch.

        Args:
            maps: ``(B, C, H_l, W_l)`` per level, finest first.
            padding_mask: ``(B, H, W)`` bool at input resolution, True = padding.
            image_sizes: un-padded (height, width) of each image.

        Raises:
            ConfigError: if the number of maps is not ``num_levels``.
        """
        if len(maps) != self.num_levels:
            raise ConfigError(
                f"The encoder is built for {self.num_levels} levels but got {len(maps)} maps; "
                "make model.encoder.num_levels match the levels of model.backbone."
            )
        level_shapes = [(m.shape[2], m.shape[3]) for m in maps]
        masks = [shrink_mask(padding_mask, *shape) for shape in level_shapes]
        # (B, C, H, W) -> (B, H*W, C), levels concatenated
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
        # Half precision could not number the cells of a large map.
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        ratios = valid_ratios(padding_mask, masks, self.strides, dtype)
        exact = [None] * len(maps) if self.strides is None else ratios.unbind(1)
        position = torch.cat(
            [
                self.position_encoding(mask, dtype, ratio).flatten(2).transpose(1, 2) + embed
                for mask, ratio, embed in zip(masks, exact, self.level_embed, strict=True)
            ],
            dim=1,
        )
        flat_mask = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        reference = reference_points(level_shapes, ratios)
        constants = (position, reference, level_shapes, flat_mask)
        for layer in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(layer, tokens, *constants, use_reentrant=False)
            else:
                tokens = layer(tokens, *constants)
        return EncoderMemory(tokens, flat_mask, level_shapes, ratios, image_sizes)
