"""The deformable transformer: encoder, decoder over all query groups, and the blocks of both.

Blocks that the transformer of one map shares stand at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from co_detr.errors import ConfigError
from co_detr.layers import MultiScaleDeformableAttention
from co_detr.modeling.geometry import Geometry, encode_boxes
from co_detr.structures import ClassRows, EncoderMemory, Predictions, QuerySet


class DeformableEncoder(nn.Module):
    """Stack of deformable layers over the flattened levels (Deformable-DETR section 4.1).

    Args:
        position_encoding: `SinePosition`.
        num_layers: layers; the arguments that follow describe one of them.
        activation_checkpointing: in training, keep only the input of every layer and compute the
            layer again in the backward pass: less memory, about a quarter more time.
        strides: of the maps in pixels, finest first. With them, the size of an image is measured in
            fractions of a cell; None: in the cells that hold a part of it, as in the reference. See
            `Geometry.at_levels`.

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

    def forward(self, maps: list[Tensor], geometry: Geometry) -> EncoderMemory:
        """Encodes one batch.

        Args:
            maps: ``(B, C, H_l, W_l)`` per level, finest first.
            geometry: sizes of the images.

        Raises:
            ConfigError: if the number of maps is not ``num_levels``.
        """
        if len(maps) != self.num_levels:
            raise ConfigError(
                f"The encoder is built for {self.num_levels} levels but got {len(maps)} maps; "
                "make model.encoder.num_levels match the levels of model.backbone."
            )
        level_shapes = [(m.shape[2], m.shape[3]) for m in maps]
        # (B, C, H, W) -> (B, H*W, C), levels concatenated
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
        # Half precision could not number the cells of a large map.
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        levels = geometry.at_levels(level_shapes, self.strides, dtype)
        codes = levels.positions(self.position_encoding)
        reference = levels.reference_points()
        position = torch.cat(
            [code + embed for code, embed in zip(codes, self.level_embed, strict=True)], dim=1
        )
        constants = (position, reference, level_shapes, levels.padding_mask, levels.sizes)
        for layer in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(layer, tokens, *constants, use_reentrant=False)
            else:
                tokens = layer(tokens, *constants)
        return EncoderMemory(tokens, levels)


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
        level_sizes: Tensor,
    ) -> Tensor:
        """``tokens, position (B, S, C)``, ``reference (B, S, L, 2)`` -> ``(B, S, C)``.

        ``level_shapes`` and ``level_sizes`` are those of `Levels`.
        """
        attended = self.attention(
            tokens + position, tokens, reference, level_shapes, padding_mask, level_sizes
        )
        tokens = self.attention_norm(tokens + self.dropout(attended))
        return self.ffn_norm(tokens + self.dropout(self.ffn(tokens)))


class DeformableDecoder(nn.Module):
    """Decodes queries layer by layer; each layer refines the boxes of the one before.

    A layer always attends around *detached* references. With ``look_forward_twice`` (DINO
    section 3.5) the box predicted by layer i starts from the undetached refinement of layer
    i - 1, so that its loss also trains that layer.

    Args:
        eps: bound of the inverse sigmoid on references; 1e-5 in Deformable-DETR, 1e-3 in DINO.
        query_position: None uses the positional queries of the query groups in every layer
            (Deformable-DETR); a module ``(B, Q, 4) boxes -> (B, Q, C)`` derives them from each
            layer's references (DAB-DETR, DINO).
        normalize_output: classes and boxes are read from the layer-normed output of a layer,
            while the references are refined from its output as it is (DINO).
        refine_boxes: False: all layers keep the references of the queries, and share one class
            and one box head (Deformable-DETR without its two additions).
        from_points: the references of the queries are points. The first boxes then have about
            0.12 of the image's size.
    """

    class_layers = {"class_heads": ClassRows()}

    def __init__(
        self,
        *,
        num_classes: int,
        num_layers: int = 6,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        feedforward_dim: int = 2048,
        dropout: float = 0.0,
        look_forward_twice: bool = True,
        eps: float = 1e-5,
        query_position: nn.Module | None = None,
        normalize_output: bool = False,
        refine_boxes: bool = True,
        from_points: bool = False,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.query_position = query_position
        self.output_norm = nn.LayerNorm(embed_dim) if normalize_output else None
        self.look_forward_twice = look_forward_twice
        self.eps = eps
        self.refine_boxes = refine_boxes
        self.from_points = from_points
        self.layers = nn.ModuleList(
            [
                DeformableDecoderLayer(
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
        num_heads_built = num_layers if refine_boxes else 1
        class_heads = [class_head(embed_dim, num_classes) for _ in range(num_heads_built)]
        box_heads = [BoxHead(embed_dim) for _ in range(num_heads_built)]
        if from_points:
            nn.init.constant_(box_heads[0].layers[-1].bias[2:], -2.0)
        if not refine_boxes:
            class_heads, box_heads = class_heads * num_layers, box_heads * num_layers
        self.class_heads = nn.ModuleList(class_heads)
        self.box_heads = nn.ModuleList(box_heads)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def forward(self, queries: QuerySet, memory: EncoderMemory) -> Predictions:
        """Decodes Q queries of every group at once.

        Returns:
            logits ``(D, B, Q, K)`` and normalized boxes ``(D, B, Q, 4)`` of all D layers.

        Raises:
            ConfigError: if both or neither of the queries and ``query_position`` give positions,
                or references are points where boxes are expected or the other way round.
        """
        self._check(queries)
        logits, boxes = [], []
        content, position = queries.content, queries.position
        reference = queries.reference  # what the next layer attends around
        base = reference  # what the next prediction starts from
        level_scale = torch.cat([memory.levels.valid_ratios] * 2, dim=-1)[:, None]  # (B, 1, L, 4)
        for layer, to_logits, to_deltas in zip(
            self.layers, self.class_heads, self.box_heads, strict=True
        ):
            if self.query_position is not None:
                # In the coordinates of the finest level, as DINO has it.
                position = self.query_position(reference * level_scale[:, :, 0])
            content = layer(
                content,
                position,
                reference[:, :, None] * level_scale[..., : reference.shape[-1]],
                memory,
                queries.attend_mask,
            )
            deltas = refinement = to_deltas(content)
            output = content
            if self.output_norm is not None:
                output = self.output_norm(content)
                deltas = to_deltas(output)
            logits.append(to_logits(output))
            boxes.append(self._moved(base, deltas))
            if self.refine_boxes:
                refined = self._moved(reference, refinement)
                reference = refined.detach()
                base = refined if self.look_forward_twice else reference
        return Predictions(torch.stack(logits), torch.stack(boxes))

    def _moved(self, reference: Tensor, deltas: Tensor) -> Tensor:
        """References ``(B, Q, 4)`` or ``(B, Q, 2)`` moved by ``(B, Q, 4)`` in logit space."""
        logits = inverse_sigmoid(reference, self.eps)
        if reference.shape[-1] == 2:
            logits = F.pad(logits, (0, 2))
        return (deltas + logits).sigmoid()

    def _check(self, queries: QuerySet) -> None:
        width = 2 if self.from_points else 4
        if queries.reference.shape[-1] != width:
            raise ConfigError(
                f"model.decoder.from_points={self.from_points} needs {width} numbers per reference "
                f"but the query sources give {queries.reference.shape[-1]}: points go with "
                "LearnedQueries alone, boxes with all other sources."
            )
        if (queries.position is None) == (self.query_position is None):
            state = "no" if queries.position is None else "also"
            raise ConfigError(
                f"model.decoder.query_position is {'not ' if state == 'no' else ''}set but the "
                f"query sources give {state} positional queries: take both from Co-Deformable-DETR "
                "or both from Co-DINO."
            )


class DeformableDecoderLayer(nn.Module):
    """Self-attention among queries, deformable attention to the memory, feed-forward; post-norm."""

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
        self.self_attention = SelfAttention(embed_dim, num_heads)
        self.self_attention_norm = nn.LayerNorm(embed_dim)
        self.cross_attention = MultiScaleDeformableAttention(
            embed_dim, num_heads, num_levels, num_points
        )
        self.cross_attention_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, feedforward_dim, dropout)
        self.ffn_norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        reference: Tensor,
        memory: EncoderMemory,
        attend_mask: Tensor | None,
    ) -> Tensor:
        """``content, position (B, Q, C)``, ``reference (B, Q, L, 4 or 2)`` -> ``(B, Q, C)``."""
        attended = self.self_attention(content, position, attend_mask)
        content = self.self_attention_norm(content + self.dropout(attended))
        attended = self.cross_attention(
            content + position,
            memory.tokens,
            reference,
            memory.levels.level_shapes,
            memory.levels.padding_mask,
        )
        content = self.cross_attention_norm(content + self.dropout(attended))
        return self.ffn_norm(content + self.dropout(self.ffn(content)))


class ReferencePosition(nn.Module):
    """Positional queries from reference boxes: sine code, then a two-layer perceptron.

    Source: DAB-DETR section 4.2; DINO, whose code is ordered y, x, width, height.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        self.embed_dim = embed_dim
        self.layers = nn.ModuleList(
            [nn.Linear(2 * embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)]
        )
        # As all of the transformer in the reference: with PyTorch's own, smaller weights positions
        # would hardly tell queries apart at the start.
        for linear in self.layers:
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, boxes: Tensor) -> Tensor:
        """Boxes ``(B, Q, 4)`` cxcywh -> ``(B, Q, C)``."""
        center_x, center_y, size = boxes.split([1, 1, 2], dim=-1)
        code = encode_boxes(torch.cat([center_y, center_x, size], dim=-1), self.embed_dim // 2)
        return self.layers[1](F.relu(self.layers[0](code)))


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


def perceptron(in_dim: int, out_dim: int) -> nn.Sequential:
    """Two linear layers with ReLU between; the hidden layer is as wide as the input."""
    layers = nn.Sequential(nn.Linear(in_dim, in_dim), nn.ReLU(), nn.Linear(in_dim, out_dim))
    for linear in (layers[0], layers[2]):
        nn.init.xavier_uniform_(linear.weight)
    return layers


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of ``x`` with both sides of the fraction bounded below by ``eps``.

    ``x`` is clamped to [0, 1] first; this is Deformable-DETR's definition, not ``torch.logit``
    (which would clamp ``x`` itself and so cut the gradient earlier).
    """
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
