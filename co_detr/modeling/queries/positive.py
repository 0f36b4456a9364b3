"""Customized positive queries: what an auxiliary head assigned, decoded as queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from co_detr.errors import ConfigError, require_whole
from co_detr.modeling.geometry import Geometry, encode_boxes
from co_detr.modeling.losses import normalize_boxes
from co_detr.modeling.transformer import inverse_sigmoid
from co_detr.structures import AssignedTargets, Candidates, QueryGroup, loss_weights, to_device


@dataclass(frozen=True)
class _Slots:
    """Chosen candidates of one image; the first ``len(indices)`` of Q slots are real."""

    indices: Tensor
    num_slots: int

    def fill(self, values: Tensor, padding: float = 0) -> Tensor:
        """``(n, ...)`` values of the chosen candidates -> ``(Q, ...)``."""
        missing = self.num_slots - len(values)
        if not missing:
            return values
        return torch.cat([values, values.new_full((missing, *values.shape[1:]), padding)])


class PositiveQueries(nn.Module):
    """Turns the positives of one auxiliary head into a supervised query group.

    1. Every image keeps its positives, at most ``max_queries`` (a random choice beyond that).
    2. The group is as long as the longest image of the step needs, and at least ``min_queries``.
       Shorter images are filled with random background candidates that are trained as background
       (``padding="negatives"``) or with masked slots that no loss sees (``padding="mask"``).
       Where the background candidates run out, the rest is masked. ``padding="unmasked"`` is
       "mask" with slots that other queries attend to, as the reference's Co-DINO has it.
    3. A projected sine code of the candidate's box gives the queries. ``with_position``: one half
       is the positional query, to which a learned scalar of the head is added, the other half is
       the content. Without, all of it is the content, and the decoder derives the position.
       ``with_features`` adds the candidate's projected feature to the content.
       Co-Deformable-DETR has both, Co-DINO none.

    The targets are the ground truths that the head had assigned; there is no matching.
    Source: Co-DETR section 3.3 ("Customized Positive Queries Generation"); ``get_aux_targets``
    and ``forward_aux`` of the reference, including the scalar head embedding.

    Args:
        with_position: None: as ``with_features``.
        self_attention: "group": queries see all of their group, as in the reference; "self": each
            sees itself only. Several of them stand for one object and are all trained to find it,
            while the same self-attention has to teach the matched queries that one is enough;
            seeing nobody, they leave that lesson alone.

    Raises:
        ConfigError: if a setting is none of its values, or out of its range.

    Attributes:
        permutation: ``n -> (n,)`` random order, on the host; replaceable, so that recorded draws
            can be fed.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int,
        with_features: bool = True,
        with_position: bool | None = None,
        padding: Literal["negatives", "mask", "unmasked"] = "negatives",
        self_attention: Literal["group", "self"] = "group",
        min_queries: int = 9,
        max_queries: int = 300,
        loss_weight: float = 1.0,
    ):
        super().__init__()
        if padding not in ("negatives", "mask", "unmasked"):
            raise ConfigError(
                f'padding must be "negatives", "mask" or "unmasked", got {padding!r}.'
            )
        if self_attention not in ("group", "self"):
            raise ConfigError(f'self_attention must be "group" or "self", got {self_attention!r}.')
        require_whole("model.auxiliary.positive_queries.min_queries", min_queries, least=0)
        require_whole("model.auxiliary.positive_queries.max_queries", max_queries)
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.padding = padding
        self.self_attention = self_attention
        self.min_queries = min_queries
        self.max_queries = max_queries
        self.loss_weight = loss_weight
        self.permutation: Callable[[int], Tensor] = torch.randperm
        self.with_features = with_features
        self.with_position = with_features if with_position is None else with_position
        width = 2 * embed_dim if self.with_position else embed_dim
        self.position_proj = nn.Linear(2 * embed_dim, width)
        self.position_norm = nn.LayerNorm(width)
        if self.with_features:
            self.feature_proj = nn.Linear(embed_dim, embed_dim)
            self.feature_norm = nn.LayerNorm(embed_dim)
        if self.with_position:
            self.head_embedding = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new initial weights: one configured instance is copied for every head."""
        nn.init.xavier_uniform_(self.position_proj.weight)
        nn.init.zeros_(self.position_proj.bias)
        if self.with_features:
            nn.init.xavier_uniform_(self.feature_proj.weight)
            nn.init.zeros_(self.feature_proj.bias)
        if self.with_position:
            nn.init.normal_(self.head_embedding)

    def forward(
        self,
        name: str,
        candidates: Candidates,
        geometry: Geometry,
        step_positives: list[int] | None = None,
    ) -> QueryGroup:
        """Makes the group.

        Args:
            name: name of the group.
            candidates: what the head assigned.
            geometry: sizes of the images, the unit of normalized boxes.
            step_positives: number of positives of each image in all micro-batches of the step;
                None: the candidates' are taken for all.
        """
        chosen = self._choose(candidates.instances, step_positives)
        group = self._group(name, candidates, chosen, geometry)
        if step_positives is None:
            return group
        counted = sum(min(group.num_queries, number) for number in step_positives)
        return replace(group, num_positives=counted)

    def of_detections(self, name: str, candidates: Candidates, geometry: Geometry) -> QueryGroup:
        """The group of all detections of the head, in their order, for inference.

        Each query sees itself only, whatever ``self_attention`` is: what becomes of a detection
        depends on no other one. The first ``len(candidates.instances[i])`` slots of image i are
        real. Nothing is drawn, and there are no targets.

        Args:
            candidates: `HeadDetections.candidates`, at least one in the batch.
        """
        numbers = [len(instances) for instances in candidates.instances]
        device = self.position_proj.weight.device
        chosen = [_Slots(torch.arange(number, device=device), max(numbers)) for number in numbers]
        group = self._group(name, candidates, chosen, geometry)
        return replace(group, targets=None, num_blocks=group.num_queries)

    def _group(
        self,
        name: str,
        candidates: Candidates,
        chosen: list[_Slots],
        geometry: Geometry,
    ) -> QueryGroup:
        dtype = self.position_proj.weight.dtype  # Detectron2's Boxes are always float32
        picked = [
            instances[slots.indices]
            for instances, slots in zip(candidates.instances, chosen, strict=True)
        ]

        def filled(fields: list[Tensor], padding: float = 0) -> Tensor:
            """One field of every image's candidates -> ``(B, Q, ...)``."""
            rows = zip(chosen, fields, strict=True)
            return torch.stack([slots.fill(field, padding) for slots, field in rows])

        if self.with_features:
            gather = candidates.gather_features
            features = [gather(image, slots.indices) for image, slots in enumerate(chosen)]
            features = filled(features)
        labels = filled([instances.gt_classes for instances in picked], padding=self.num_classes)
        valid = filled([torch.ones_like(slots.indices) for slots in chosen])
        boxes = filled([instances.proposal_boxes.tensor.to(dtype) for instances in picked])
        targets = filled([instances.gt_boxes.tensor.to(dtype) for instances in picked])
        weights = valid.to(dtype)
        if any(instances.has("gt_weights") for instances in picked):
            weights = filled([loss_weights(instances).to(dtype) for instances in picked])
        factors = geometry.factors[:, None]
        boxes, targets = normalize_boxes(boxes, factors), normalize_boxes(targets, factors)
        # Anchors may be larger than the image: attention uses them as they are, their code is
        # that of the box cut to (0, 1).
        code = encode_boxes(inverse_sigmoid(boxes).sigmoid(), self.embed_dim // 2)
        position, content = None, self.position_norm(self.position_proj(code))
        if self.with_position:
            position, content = content.chunk(2, dim=-1)
            position = position + self.head_embedding
        if self.with_features:
            content = content + self.feature_norm(self.feature_proj(features))
        all_seen = self.padding == "unmasked" or all(
            len(slots.indices) == slots.num_slots for slots in chosen
        )
        return QueryGroup(
            name=name,
            content=content,
            position=position,
            reference=boxes,
            valid=None if all_seen else valid.bool(),
            targets=AssignedTargets(
                labels=labels[None],
                boxes=targets[None],
                weights=weights[None],
            ),
            loss_weight=self.loss_weight,
            num_blocks=boxes.shape[1] if self.self_attention == "self" else 1,
        )

    def _choose(self, instances: list[Instances], step_positives: list[int] | None) -> list[_Slots]:
        """Chooses on the host: one transfer of the classes, instead of one for every count."""
        classes = [image.gt_classes for image in instances]
        host = torch.cat(classes).cpu().split([len(labels) for labels in classes])
        positives = [
            ((labels >= 0) & (labels < self.num_classes)).nonzero().squeeze(1) for labels in host
        ]
        longest = max(step_positives or map(len, positives))
        num_slots = max(self.min_queries, min(self.max_queries, longest))
        chosen = []
        for labels, indices in zip(host, positives, strict=True):
            if len(indices) > num_slots:
                indices = self._draw(indices, num_slots)
            elif len(indices) < num_slots and self.padding == "negatives":
                background = (labels == self.num_classes).nonzero().squeeze(1)
                filler = self._draw(background, num_slots - len(indices))
                indices = torch.cat([indices, filler])
            chosen.append(indices)
        on_device = to_device(torch.cat(chosen), classes[0].device)
        return [
            _Slots(indices, num_slots)
            for indices in on_device.split([len(indices) for indices in chosen])
        ]

    def _draw(self, indices: Tensor, number: int) -> Tensor:
        return indices[self.permutation(len(indices))[:number]]
