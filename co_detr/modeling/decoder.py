"""Deformable decoder: one pass over all query groups, with iterative box refinement."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from co_detr.errors import ConfigError
from co_detr.layers import MultiScaleDeformableAttention
from co_detr.modeling.geometry import encode_boxes, inverse_sigmoid
from co_detr.modeling.transformer_layers import BoxHead, FeedForward, SelfAttention, class_head
from co_detr.structures import EncoderMemory, Predictions, QuerySet


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
            memory.level_shapes,
            memory.padding_mask,
        )
        content = self.cross_attention_norm(content + self.dropout(attended))
        return self.ffn_norm(content + self.dropout(self.ffn(content)))


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
        normalise_output: classes and boxes are read from the layer-normed output of a layer,
            while the references are refined from its output as it is (DINO).
        refine_boxes: False: all layers keep the references of the queries, and share one class
            and one box head (Deformable-DETR without its two additions).
        from_points: the references of the queries are points. The first boxes then have about
            0.12 of the image's size.
    """

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
        normalise_output: bool = False,
        refine_boxes: bool = True,
        from_points: bool = False,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.query_position = query_position
        self.output_norm = nn.LayerNorm(embed_dim) if normalise_output else None
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
            logits ``(D, B, Q, K)`` and normalised boxes ``(D, B, Q, 4)`` of all D layers.

        Raises:
            ConfigError: if both or neither of the queries and ``query_position`` give positions,
                or references are points where boxes are expected or the other way round.
        """
        self._check(queries)
        logits, boxes = [], []
        content, position = queries.content, queries.position
        reference = queries.reference  # what the next layer attends around
        base = reference  # what the next prediction starts from
        level_scale = torch.cat([memory.valid_ratios] * 2, dim=-1)[:, None]  # (B, 1, L, 4)
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
        centre_x, centre_y, size = boxes.split([1, 1, 2], dim=-1)
        code = encode_boxes(torch.cat([centre_y, centre_x, size], dim=-1), self.embed_dim // 2)
        return self.layers[1](F.relu(self.layers[0](code)))
