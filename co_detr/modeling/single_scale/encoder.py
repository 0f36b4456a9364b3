"""Dense encoder: one map in, ``EncoderMemory`` of one level out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from co_detr.errors import ConfigError
from co_detr.modeling.geometry import shrink_mask, valid_ratios
from co_detr.modeling.transformer import FeedForward, SelfAttention, perceptron
from co_detr.structures import EncoderMemory


class TransformerEncoderLayer(nn.Module):
    """Self-attention of all tokens, then feed-forward; post-norm."""

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
        activation: type[nn.Module],
    ):
        super().__init__()
        self.attention = SelfAttention(embed_dim, num_heads, dropout)
        self.attention_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, feedforward_dim, dropout, activation())
        self.ffn_norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, position: Tensor, attend_mask: Tensor) -> Tensor:
        """``tokens, position (B, S, C)``, ``attend_mask (B, 1, 1, S)`` -> ``(B, S, C)``."""
        attended = self.attention(tokens, position, attend_mask)
        tokens = self.attention_norm(tokens + self.dropout(attended))
        return self.ffn_norm(tokens + self.dropout(self.ffn(tokens)))


class TransformerEncoder(nn.Module):
    """Stack of layers with standard attention on the tokens of one map (DETR section 3.2).

    Queries and keys get the sine code of their position added; tokens in the padding are no keys.

    Args:
        position_encoding: `SinePosition`.
        num_layers: layers; the arguments that follow describe one of them.
        activation: class of the feed-forward's activation; ``nn.PReLU`` in DAB-DETR.
        scale_position: multiply the code, in every layer, by a perceptron of the tokens, the same
            for all layers (``query_scale`` in the encoder of DAB-DETR's code).
        stride: of the map in pixels. With it, the size of an image is measured in fractions of a
            cell; None: in the cells that hold a part of it, as in the papers' code. See
            `valid_ratios`.
    """

    num_levels = 1

    def __init__(
        self,
        *,
        position_encoding: nn.Module,
        num_layers: int = 6,
        embed_dim: int = 256,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        dropout: float = 0.0,
        activation: type[nn.Module] = nn.ReLU,
        scale_position: bool = False,
        stride: int | None = None,
    ):
        super().__init__()
        self.position_encoding = position_encoding
        self.strides = None if stride is None else [stride]
        self.layers = nn.ModuleList(
            [
                TransformerEncoderLayer(
                    embed_dim=embed_dim,
                    num_heads=num_heads,
                    feedforward_dim=feedforward_dim,
                    dropout=dropout,
                    activation=activation,
                )
                for _ in range(num_layers)
            ]
        )
        self.position_scale = perceptron(embed_dim, embed_dim) if scale_position else None

    def forward(
        self, maps: list[Tensor], padding_mask: Tensor, image_sizes: list[tuple[int, int]]
    ) -> EncoderMemory:
        """Encodes one batch.

        Args:
            maps: a single map ``(B, C, H, W)``.
            padding_mask: ``(B, H, W)`` bool at input resolution, True = padding.
            image_sizes: un-padded (height, width) of each image.

        Raises:
            ConfigError: if there are several maps.
        """
        if len(maps) != 1:
            raise ConfigError(
                f"TransformerEncoder encodes one map but got {len(maps)}: let model.backbone give "
                'one, as in model.backbone.in_features=["res5"] without extra levels.'
            )
        height, width = maps[0].shape[2:]
        mask = shrink_mask(padding_mask, height, width)
        tokens = maps[0].flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H*W, C)
        # Half precision could not number the cells of a large map.
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        ratios = valid_ratios(padding_mask, [mask], self.strides, dtype)
        exact = None if self.strides is None else ratios[:, 0]
        position = self.position_encoding(mask, dtype, exact).flatten(2).transpose(1, 2)
        attend_mask = ~mask.flatten(1)[:, None, None]
        for layer in self.layers:
            scaled = position
            if self.position_scale is not None:
                scaled = position * self.position_scale(tokens)
            tokens = layer(tokens, scaled, attend_mask)
        return EncoderMemory(
            tokens=tokens,
            padding_mask=mask.flatten(1),
            level_shapes=[(height, width)],
            valid_ratios=ratios,
            image_sizes=image_sizes,
            position=position,
        )
