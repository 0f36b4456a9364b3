"""Query sources: learned ones (content, anchors, points), two-stage ones, hybrid matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from co_detr.errors import ConfigError, require_whole
from co_detr.modeling.geometry import encode_boxes
from co_detr.modeling.transformer import BoxHead, class_head, perceptron
from co_detr.structures import (
    ClassRows,
    EncoderMemory,
    EncoderProposals,
    GroundTruth,
    Predictions,
    QueryGroup,
    StepCounts,
)


class QuerySources(nn.ModuleDict):
    """The query sources of a model, by the names of their groups.

    Sources are keyword arguments: their names become prefixes of losses and paths of config
    overrides (``model.queries.matching...``). One that is None is left out. The source that is not
    ``training_only`` is the one that inference uses.

    Raises:
        ConfigError: if a source sees a group that no source makes, or not exactly one is for
            inference.
    """

    def __init__(self, **sources: QuerySource | None):
        super().__init__({name: source for name, source in sources.items() if source is not None})
        for name, source in self.items():
            source.name = name
            seen = getattr(source, "sees", name)
            if seen not in self:
                raise ConfigError(
                    f"model.queries.{name}.sees={seen} names no source of model.queries: it has "
                    f"{', '.join(self)}."
                )
        found = [name for name, source in self.items() if not source.training_only]
        if len(found) != 1:
            raise ConfigError(
                "model.queries needs exactly one source that is not training-only, got "
                f"{len(found)}."
            )
        (self.inference,) = found

    def strip(self) -> None:
        """Removes all that only training uses."""
        for name in [name for name in self if name != self.inference]:
            del self[name]
        self[self.inference].strip()


class QuerySource(nn.Module):
    """Makes query groups for the decoder from the encoder memory.

    A model has one source that inference uses; the others are ``training_only``.

    Attributes:
        name: of its group, which it gets from `QuerySources`.
        training_modules: names of the modules that only ``training_groups`` uses.
    """

    name = "matching"
    training_only = False
    training_modules: tuple[str, ...] = ()

    def forward(
        self, memory: EncoderMemory, ground_truth: list[GroundTruth] | None = None
    ) -> QueryGroup:
        """The group of this source, or the one of inference where training has more."""
        raise NotImplementedError

    def training_groups(
        self,
        memory: EncoderMemory,
        ground_truth: list[GroundTruth],
        counts: StepCounts | None = None,
    ) -> list[QueryGroup]:
        """All groups of a training step.

        Args:
            counts: of all micro-batches of the step; None: this batch is all of it.
        """
        return [self(memory, ground_truth)]

    def strip(self) -> None:
        """Removes ``training_modules``."""
        for name in self.training_modules:
            setattr(self, name, None)


def training_module_names() -> set[str]:
    """``training_modules`` of all kinds of sources: a file may be of another kind than a model."""
    kinds, names = [QuerySource], set()
    for kind in kinds:
        kinds += kind.__subclasses__()
        names |= set(kind.training_modules)
    return names


class LearnedQueries(QuerySource):
    """Learned content and positional queries; a linear layer of the latter gives the points.

    Source: Deformable-DETR section 4.1 (decoder), whose reference points are predicted from the
    query embedding.

    Args:
        num_queries: Q; embed_dim: width C.
        training_only: for further groups beside the one of inference (Group-DETR).

    Raises:
        ConfigError: if ``num_queries`` is no whole number of at least 1.
    """

    def __init__(
        self,
        *,
        num_queries: int,
        embed_dim: int,
        training_only: bool = False,
    ):
        super().__init__()
        require_whole("model.queries.*.num_queries", num_queries)
        self.num_queries = num_queries
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


class AnchorQueries(QuerySource):
    """Learned anchor boxes; the decoder derives the positional queries from them.

    Anchors are learned as logits. Content starts at zero.
    Source: DAB-DETR section 4.2; its code without patterns and without fixed centers.

    Raises:
        ConfigError: if ``num_queries`` is no whole number of at least 1.
    """

    def __init__(self, *, num_queries: int, embed_dim: int):
        super().__init__()
        require_whole("model.queries.*.num_queries", num_queries)
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

    Content starts at zero. Reference boxes have the point as their center and half the image's
    size, which is where the size predicted by a box head that is still zero starts, too.
    Source: Conditional-DETR section 3.2; ``ref_point_head`` of its code.

    Raises:
        ConfigError: if ``num_queries`` is no whole number of at least 1.
    """

    def __init__(self, *, num_queries: int, embed_dim: int):
        super().__init__()
        require_whole("model.queries.*.num_queries", num_queries)
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


class TwoStageQueries(QuerySource):
    """Top-scoring encoder proposals with learned content (mixed query selection).

    1. Every token proposes a box: a grid prior plus a predicted offset.
    2. Tokens are ranked by their scores; the best ``num_queries`` give the references. Inputs that
       have fewer tokens, as very thin ones, make do with as many queries.
    3. Content queries are learned, one per rank; positional queries code the reference box.
       ``with_features`` adds the proposing token's projected feature to the content.

    Source: Deformable-DETR appendix A.4; DINO section 3.4; Co-DETR's ``CoDeformDETRHead`` and
    ``CoDINOHead``. These have no features: they are what `PositiveQueries` takes from its
    candidates, so that with them the queries of inference are made like those that the auxiliary
    heads train.

    Args:
        ranking: "first_class": by the logit of class 0, which stands for "object" because all
            tokens are trained with every label set to 0 (Deformable-DETR); "best_class": by the
            largest logit, and only the chosen tokens are trained, with true labels (DINO).
        with_position: False leaves the positional queries to the decoder (DINO).
        with_features: whether the content tells what the token saw.
        training_only: for further groups with weights of their own beside the one of inference
            (Group-DETR).

    Raises:
        ConfigError: if ``ranking`` or ``num_queries`` cannot be.
    """

    class_layers = {"class_head": ClassRows()}

    def __init__(
        self,
        *,
        num_queries: int,
        num_classes: int,
        embed_dim: int,
        ranking: Literal["first_class", "best_class"] = "first_class",
        with_position: bool = True,
        with_features: bool = False,
        training_only: bool = False,
    ):
        super().__init__()
        if ranking not in ("first_class", "best_class"):
            raise ConfigError(f'ranking must be "first_class" or "best_class", got {ranking!r}.')
        self.ranking = ranking
        self.with_position = with_position
        self.with_features = with_features
        self.training_only = training_only
        require_whole("model.queries.*.num_queries", num_queries)
        self.num_queries = num_queries
        self.num_classes = num_classes
        self.memory_proj = nn.Linear(embed_dim, embed_dim)
        self.memory_norm = nn.LayerNorm(embed_dim)
        self.class_head = class_head(embed_dim, num_classes)
        self.box_head = BoxHead(embed_dim)
        self.content = nn.Embedding(num_queries, embed_dim)
        projections = [self.memory_proj]
        if with_position:
            # Twice the width as in released checkpoints, where the second half would be the
            # content of the variant without learned content; the norm runs over both halves.
            self.position_proj = nn.Linear(2 * embed_dim, 2 * embed_dim)
            self.position_norm = nn.LayerNorm(2 * embed_dim)
            projections.append(self.position_proj)
        if with_features:
            self.feature_proj = nn.Linear(embed_dim, embed_dim)
            self.feature_norm = nn.LayerNorm(embed_dim)
            projections.append(self.feature_proj)
        for linear in projections:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, memory: EncoderMemory, ground_truth: list[GroundTruth] | None = None
    ) -> QueryGroup:
        """Makes the group of ``num_queries`` one-to-one matched queries.

        Args:
            memory: encoder output.
            ground_truth: not used here; other query sources need it.
        """
        number = min(self.num_queries, memory.tokens.shape[1])
        return self._matched_group(memory, self._rank(memory, number))

    def _rank(self, memory: EncoderMemory, count: int) -> RankedProposals:
        output_memory, grid_logits = propose_grid(memory)
        output_memory = self.memory_norm(self.memory_proj(output_memory))
        class_logits = self.class_head(output_memory)
        box_logits = self.box_head(output_memory) + grid_logits
        best_class = self.ranking == "best_class"
        scores = class_logits.amax(-1) if best_class else class_logits[..., 0]
        return RankedProposals(class_logits, box_logits, scores.topk(count, dim=1).indices)

    def _matched_group(self, memory: EncoderMemory, ranked: RankedProposals) -> QueryGroup:
        class_logits, box_logits = ranked.class_logits, ranked.box_logits
        best_class = self.ranking == "best_class"
        chosen = ranked.best[:, : self.num_queries]
        if best_class:
            class_logits, box_logits = (_gather_rows(x, chosen) for x in (class_logits, box_logits))
        predictions = Predictions(class_logits[None], box_logits.sigmoid()[None])
        reference = ranked.references(0, chosen.shape[1])
        return QueryGroup(
            name=self.name,
            content=self._content(self.content, memory, chosen),
            position=self._position(reference) if self.with_position else None,
            reference=reference,
            proposals=EncoderProposals(predictions, binary=not best_class),
            tokens=chosen,
        )

    def _content(self, learned: nn.Embedding, memory: EncoderMemory, tokens: Tensor) -> Tensor:
        """``(B, Q, C)`` of queries that were made from tokens ``(B, Q)``."""
        content = learned.weight[: tokens.shape[1]].expand(tokens.shape[0], -1, -1)
        if not self.with_features:
            return content
        return content + self.feature_norm(self.feature_proj(_gather_rows(memory.tokens, tokens)))

    def _position(self, reference: Tensor) -> Tensor:
        embed_dim = self.content.embedding_dim
        code = encode_boxes(reference, embed_dim // 2)
        return self.position_norm(self.position_proj(code))[..., :embed_dim]


class HybridMatchingQueries(TwoStageQueries):
    """Two-stage queries with a second, training-only group that is matched one-to-many.

    1. The best ``num_queries`` proposals are the one-to-one group of inference.
    2. The next ``num_extra`` ones are a group of their own in training. Every ground truth is
       repeated ``repeats`` times before its Hungarian matching.

    Both groups share the proposals and the code of their positions, are blind to each other, and
    have learned content queries of their own.
    Source: Jia et al., "DETRs with Hybrid Matching", CVPR 2023, section 3.2 (hybrid branch).

    Args:
        num_extra: queries of the one-to-many group, T in the paper.
        repeats: queries that each ground truth is matched to, K in the paper.
        loss_weight: of the one-to-many group, lambda in the paper.

    Further arguments are those of `TwoStageQueries`.

    Raises:
        ConfigError: if a number of queries is no whole number of at least 1.
    """

    training_modules = ("extra_content",)

    def __init__(
        self,
        *,
        num_queries: int,
        num_classes: int,
        embed_dim: int,
        ranking: Literal["first_class", "best_class"] = "first_class",
        with_position: bool = True,
        with_features: bool = False,
        num_extra: int = 1500,
        repeats: int = 6,
        loss_weight: float = 1.0,
    ):
        super().__init__(
            num_queries=num_queries,
            num_classes=num_classes,
            embed_dim=embed_dim,
            ranking=ranking,
            with_position=with_position,
            with_features=with_features,
        )
        self.repeats = repeats
        self.loss_weight = loss_weight
        require_whole("model.queries.*.num_extra", num_extra)
        self.extra_content: nn.Embedding | None = nn.Embedding(num_extra, embed_dim)

    def training_groups(
        self,
        memory: EncoderMemory,
        ground_truth: list[GroundTruth],
        counts: StepCounts | None = None,
    ) -> list[QueryGroup]:
        """The one-to-one group, and the one-to-many group ``one_to_many``.

        Raises:
            ConfigError: if the image batch has fewer tokens than both groups have queries.
        """
        if self.extra_content is None:
            return super().training_groups(memory, ground_truth)
        count = self.num_queries + self.extra_content.num_embeddings
        if memory.tokens.shape[1] < count:
            raise ConfigError(
                f"{count} queries need as many encoder tokens, but an input of "
                f"{memory.image_sizes} pixels gives {memory.tokens.shape[1]}: lower num_extra of "
                f"the source {self.name} in model.queries, or feed larger images."
            )
        ranked = self._rank(memory, count)
        tokens = ranked.best[:, self.num_queries :]
        reference = ranked.references(self.num_queries, ranked.best.shape[1])
        one_to_many = QueryGroup(
            name="one_to_many",
            content=self._content(self.extra_content, memory, tokens),
            position=self._position(reference) if self.with_position else None,
            reference=reference,
            truth_repeats=self.repeats,
            loss_weight=self.loss_weight,
            tokens=tokens,
        )
        return [self._matched_group(memory, ranked), one_to_many]


@dataclass(frozen=True)
class RankedProposals:
    """What every token proposes, class logits ``(B, S, K)`` and box logits ``(B, S, 4)``, and the
    indices ``(B, N)`` of the best tokens, best first."""

    class_logits: Tensor
    box_logits: Tensor
    best: Tensor

    def references(self, start: int, stop: int) -> Tensor:
        """Boxes ``(B, stop - start, 4)`` of some ranks, detached."""
        return _gather_rows(self.box_logits, self.best[:, start:stop]).detach().sigmoid()


def _gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """``(B, S, X)`` rows at ``(B, Q)`` -> ``(B, Q, X)``."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def propose_grid(memory: EncoderMemory) -> tuple[Tensor, Tensor]:
    """Grid priors of all tokens, and the memory without the tokens that cannot propose.

    A prior is centered on its cell and has side 0.05 * 2^level of the un-padded image. Tokens in
    the padding, or whose prior leaves (0.01, 0.99), cannot propose: their memory is zeroed and
    their logits are +inf (a box at 1 that gets no gradient).

    Returns:
        memory ``(B, S, C)`` and box logits ``(B, S, 4)``, cxcywh.
    """
    grid = memory.levels.grid_priors()
    usable = ((grid > 0.01) & (grid < 0.99)).all(-1, keepdim=True)
    usable &= ~memory.levels.padding_mask[..., None]
    logits = torch.log(grid / (1 - grid)).masked_fill(~usable, float("inf"))
    return memory.tokens.masked_fill(~usable, 0.0), logits
