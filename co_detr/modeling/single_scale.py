"""The transformer of one map: dense encoder, and the decoders of Conditional-DETR and DAB-DETR."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from co_detr.errors import ConfigError
from co_detr.modeling.geometry import Geometry, encode_boxes
from co_detr.modeling.transformer import (
    BoxHead,
    FeedForward,
    ReferencePosition,
    SelfAttention,
    class_head,
    dropout_rate,
    inverse_sigmoid,
    perceptron,
    split_heads,
)
from co_detr.structures import ClassRows, EncoderMemory, Predictions, QuerySet


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
            `Geometry.at_levels`.
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

    def forward(self, maps: list[Tensor], geometry: Geometry) -> EncoderMemory:
        """Encodes one batch.

        Args:
            maps: a single map ``(B, C, H, W)``.
            geometry: sizes of the images.

        Raises:
            ConfigError: if there are several maps.
        """
        if len(maps) != 1:
            raise ConfigError(
                f"TransformerEncoder encodes one map but got {len(maps)}: let model.backbone give "
                'one, as in model.backbone.in_features=["res5"] without extra levels.'
            )
        tokens = maps[0].flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H*W, C)
        # Half precision could not number the cells of a large map.
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        levels = geometry.at_levels([tuple(maps[0].shape[2:])], self.strides, dtype)
        (position,) = levels.positions(self.position_encoding)
        attend_mask = ~levels.padding_mask[:, None, None]
        for layer in self.layers:
            scaled = position
            if self.position_scale is not None:
                scaled = position * self.position_scale(tokens)
            tokens = layer(tokens, scaled, attend_mask)
        return EncoderMemory(tokens, levels, position)


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


class _ConditionalDecoderBase(nn.Module):
    """Layers, spatial queries and heads of both decoders.

    All layers share one class head, one box head and one output norm. ``class_heads`` and
    ``box_heads`` are lists as in `DeformableDecoder`, so that checkpoint tools find them.

    Args:
        activation: class of the feed-forward's activation.
        eps: bound of the inverse sigmoid on references.
    """

    class_layers = {"class_heads": ClassRows()}

    def __init__(
        self,
        *,
        num_classes: int,
        num_layers: int = 6,
        embed_dim: int = 256,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        dropout: float = 0.0,
        activation: type[nn.Module] = nn.ReLU,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.eps = eps
        self.layers = nn.ModuleList(
            [
                ConditionalDecoderLayer(
                    embed_dim=embed_dim,
                    num_heads=num_heads,
                    feedforward_dim=feedforward_dim,
                    dropout=dropout,
                    activation=activation,
                    is_first=index == 0,
                )
                for index in range(num_layers)
            ]
        )
        # The first layer does not scale: a decoder of one layer would never train it.
        self.spatial_scale = perceptron(embed_dim, embed_dim) if num_layers > 1 else None
        self.output_norm = nn.LayerNorm(embed_dim)
        self.class_heads = nn.ModuleList([class_head(embed_dim, num_classes)])
        self.box_heads = nn.ModuleList([BoxHead(embed_dim)])

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def _spatial(self, center: Tensor, content: Tensor, layer: int) -> Tensor:
        """Sine code of centers ``(B, Q, 2)``, y before x, scaled by the content ``(B, Q, C)``."""
        code = encode_boxes(center.flip(-1), self.embed_dim // 2)
        # In the first layer the content has not seen the image yet.
        return code if layer == 0 else code * self.spatial_scale(content)

    def _predict(self, outputs: list[Tensor], bases: list[Tensor]) -> Predictions:
        """Outputs ``(B, Q, C)`` and logits ``(B, Q, 4)`` that boxes start from, per layer."""
        normed = self.output_norm(torch.stack(outputs))
        deltas = self.box_heads[0](normed)
        return Predictions(self.class_heads[0](normed), (deltas + torch.stack(bases)).sigmoid())

    @staticmethod
    def _check(memory: EncoderMemory) -> None:
        if memory.position is None:
            raise ConfigError(
                "model.decoder attends to positions of the encoder's tokens, which model.encoder "
                "does not give: take TransformerEncoder."
            )


class ConditionalDecoder(_ConditionalDecoderBase):
    """Decoder of Conditional-DETR (Meng et al., ICCV 2021): fixed reference points.

    1. The spatial query is the sine code of the reference point, which is the center of the
       reference box; after the first layer it is scaled by a perceptron of the content.
    2. The positional queries are those of the query groups, the same in all layers.
    3. Every layer predicts a center relative to the reference point and a size from scratch:
       the size of a reference box is not read. So customized positive queries, whose boxes have
       sizes, learn the same task as the matched queries; the size reaches them by their position.

    References get gradients where they learn: the reference point of a matched query does.
    Source: sections 3.2 and 3.3; ``TransformerDecoder`` and ``ConditionalDETR`` of its code.
    """

    def forward(self, queries: QuerySet, memory: EncoderMemory) -> Predictions:
        """Decodes Q queries of every group at once.

        Returns:
            logits ``(D, B, Q, K)`` and normalized boxes ``(D, B, Q, 4)`` of all D layers.

        Raises:
            ConfigError: if queries or memory come without positions.
        """
        self._check(memory)
        if queries.position is None:
            raise ConfigError(
                "ConditionalDecoder needs positional queries but the query sources give none: use "
                "PointQueries, and PositiveQueries with_position."
            )
        content = queries.content
        center = queries.reference[..., :2]
        base = inverse_sigmoid(center, self.eps)
        base = torch.cat([base, torch.zeros_like(base)], dim=-1)
        outputs = []
        for index, layer in enumerate(self.layers):
            spatial = self._spatial(center, content, index)
            content = layer(content, queries.position, spatial, memory, queries.attend_mask)
            outputs.append(content)
        return self._predict(outputs, [base] * len(outputs))


class DABDecoder(_ConditionalDecoderBase):
    """Decoder of DAB-DETR (Liu et al., ICLR 2022): references are anchor boxes that move.

    1. The positional queries are a perceptron of the sine code of the whole anchor.
    2. The spatial query is the sine code of the anchor's center, scaled by a perceptron of the
       content as in Conditional-DETR; its x half is multiplied by (reference width predicted from
       the content / width of the anchor), its y half likewise with heights, so that attention is
       as wide and high as the anchor.
    3. Every layer moves the anchor. The next layer attends around the detached anchor, but its
       predicted box starts from the undetached one, as in the code of DAB-DETR. Predictions are
       read from the normed output of a layer, anchors are moved by its output as it is.

    Widths and heights below ``eps`` count as ``eps`` in 2. In the code they come from a sigmoid;
    an anchor of a customized positive query can be empty.
    Source: sections 4.2 to 4.4; ``TransformerDecoder`` and ``DABDETR`` of its code.

    Args:
        settings: of the layers, as in `ConditionalDecoder`.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int = 256,
        activation: type[nn.Module] = nn.PReLU,
        eps: float = 1e-3,
        **settings: int | float,
    ):
        settings.update(num_classes=num_classes, embed_dim=embed_dim)
        super().__init__(activation=activation, eps=eps, **settings)
        self.query_position = ReferencePosition(embed_dim)
        self.size_head = perceptron(embed_dim, 2)

    def forward(self, queries: QuerySet, memory: EncoderMemory) -> Predictions:
        """Decodes Q queries of every group at once.

        Returns:
            logits ``(D, B, Q, K)`` and normalized boxes ``(D, B, Q, 4)`` of all D layers.

        Raises:
            ConfigError: if the queries have positions, or the memory has none.
        """
        self._check(memory)
        if queries.position is not None:
            raise ConfigError(
                "DABDecoder derives positional queries from the anchors but the query sources "
                "also give some: use AnchorQueries, and PositiveQueries without with_position."
            )
        content = queries.content
        reference = base = queries.reference
        outputs, bases = [], []
        for index, layer in enumerate(self.layers):
            position = self.query_position(reference)
            spatial = self._spatial(reference[..., :2], content, index)
            spatial = self._modulate(spatial, content, reference[..., 2:])
            content = layer(content, position, spatial, memory, queries.attend_mask)
            outputs.append(content)
            bases.append(inverse_sigmoid(base, self.eps))
            deltas = self.box_heads[0](content)
            base = (deltas + inverse_sigmoid(reference, self.eps)).sigmoid()
            reference = base.detach()
        return self._predict(outputs, bases)

    def _modulate(self, spatial: Tensor, content: Tensor, size: Tensor) -> Tensor:
        """Scales the halves of ``spatial (B, Q, C)`` by relative height and width."""
        relative = self.size_head(content).sigmoid() / size.clamp(min=self.eps)  # (B, Q, 2)
        halves = spatial.unflatten(-1, (2, -1)) * relative.flip(-1)[..., None]  # y, then x
        return halves.flatten(-2)


class ConditionalDecoderLayer(nn.Module):
    """Self-attention, conditional cross-attention, feed-forward; post-norm."""

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
        activation: type[nn.Module],
        is_first: bool,
    ):
        super().__init__()
        self.self_attention = ConditionalSelfAttention(embed_dim, num_heads, dropout)
        self.self_attention_norm = nn.LayerNorm(embed_dim)
        self.cross_attention = ConditionalCrossAttention(
            embed_dim, num_heads, dropout, adds_position=is_first
        )
        self.cross_attention_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, feedforward_dim, dropout, activation())
        self.ffn_norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        spatial: Tensor,
        memory: EncoderMemory,
        attend_mask: Tensor | None,
    ) -> Tensor:
        """``content, position, spatial (B, Q, C)`` -> ``(B, Q, C)``."""
        attended = self.self_attention(content, position, attend_mask)
        content = self.self_attention_norm(content + self.dropout(attended))
        attended = self.cross_attention(content, position, spatial, memory)
        content = self.cross_attention_norm(content + self.dropout(attended))
        return self.ffn_norm(content + self.dropout(self.ffn(content)))


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
