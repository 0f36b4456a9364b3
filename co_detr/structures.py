"""Typed values that travel between the parts of a model, and how values travel to the device.

Letters used in shapes: B images, L levels, S tokens (all levels), Q queries, G ground truths,
R candidates, C channels, D decoder layers, K foreground classes.

Boxes come in two units only. *Absolute* boxes are xyxy pixels of the network input and live in
``detectron2.structures.Boxes`` inside ``Instances``. *Normalized* boxes are cxcywh in [0, 1] of
the un-padded image and are bare tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from torch import Tensor

from co_detr.errors import ConfigError

if TYPE_CHECKING:
    from co_detr.modeling.geometry import Geometry, Levels


@dataclass(frozen=True)
class EncoderMemory:
    """Encoder output and the geometry needed to read it.

    Attributes:
        tokens: ``(B, S, C)``, levels concatenated, finest first, row-major inside a level.
        levels: where the images and the cells of the levels lie.
        position: ``(B, S, C)`` code of each token's position, which dense cross-attention adds to
            its keys; None from the deformable encoder, as deformable attention has no keys.
    """

    tokens: Tensor
    levels: Levels
    position: Tensor | None = None

    @property
    def padding_mask(self) -> Tensor:
        return self.levels.padding_mask

    @property
    def level_shapes(self) -> list[tuple[int, int]]:
        return self.levels.level_shapes

    @property
    def valid_ratios(self) -> Tensor:
        return self.levels.valid_ratios

    @property
    def geometry(self) -> Geometry:
        return self.levels.images

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        return self.levels.images.image_sizes

    def level_tokens(self) -> list[Tensor]:
        """Views ``(B, H*W, C)`` of the tokens, one per level."""
        return list(self.tokens.split([h * w for h, w in self.level_shapes], dim=1))

    def maps(self) -> list[Tensor]:
        """The tokens folded back to maps ``(B, C, H, W)``, one per level."""
        return [
            tokens.transpose(1, 2).unflatten(2, shape)
            for tokens, shape in zip(self.level_tokens(), self.level_shapes, strict=True)
        ]


@dataclass(frozen=True)
class GroundTruth:
    """What one image should be detected as.

    Attributes:
        labels: ``(G,)`` int64 in [0, K).
        boxes: ``(G, 4)`` normalized cxcywh.
        factor: ``(4,)`` of `Geometry.factors`, to get back to pixels.
        weights: ``(G,)`` what the losses of each are multiplied by; None: 1.
    """

    labels: Tensor
    boxes: Tensor
    factor: Tensor
    weights: Tensor | None = None


def loss_weights(instances: Instances) -> Tensor:
    """``(G,)`` what the losses of objects are multiplied by: their ``gt_weights``, or 1."""
    if instances.has("gt_weights"):
        return instances.gt_weights
    return torch.ones_like(instances.gt_classes, dtype=torch.float32)


def bitmaps_of(masks: BitMasks | PolygonMasks, image_size: tuple[int, int]) -> Tensor:
    """``gt_masks`` of an image as one tensor.

    Data sets give `BitMasks`; polygons may come from elsewhere, and are drawn on the host.

    Args:
        masks: of G objects, in pixels of the network input without padding.
        image_size: (height, width) of that.

    Returns:
        ``(G, height, width)`` bool, where the masks are; polygons on the CPU.
    """
    if isinstance(masks, BitMasks):
        return masks.tensor
    return BitMasks.from_polygon_masks(masks, *image_size).tensor


@dataclass(frozen=True)
class Predictions:
    """Class logits ``(D, B, Q, K)`` and normalized boxes ``(D, B, Q, 4)`` of D layers."""

    logits: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class AssignedTargets:
    """What every query should predict; D is 1 where all decoder layers share the targets.

    Attributes:
        labels: ``(D, B, Q)`` int64 in [0, K]; K is background.
        boxes: ``(D, B, Q, 4)`` normalized; meaningless where the label is background.
        weights: ``(D, B, Q)``; 0 takes a slot out of every loss and every normalizer.
    """

    labels: Tensor
    boxes: Tensor
    weights: Tensor


@dataclass(frozen=True)
class EncoderProposals:
    """Dense predictions of a two-stage query source that have a loss of their own.

    Attributes:
        predictions: D = 1, one slot per supervised token.
        binary: the reference trains Co-Deformable-DETR's proposals with every label set to 0.
    """

    predictions: Predictions
    binary: bool


@dataclass(frozen=True)
class QueryGroup:
    """Queries that see each other, are decoded together with all others and scored as one.

    By default queries see their whole group and nothing else; ``num_blocks`` and ``sees`` say
    otherwise (contrastive denoising: blocks are blind to each other, all see the matched queries).

    A group is supervised either by ``targets`` (known when it is made) or, when those are None,
    by one-to-one matching after decoding.

    Attributes:
        name: prefix of its losses.
        content: ``(B, Q, C)`` content queries.
        position: ``(B, Q, C)`` positional queries; None where the decoder derives them from the
            reference boxes.
        reference: ``(B, Q, 4)`` normalized reference boxes, or ``(B, Q, 2)`` points; detached,
            except where they are parameters that learn.
        valid: ``(B, Q)`` bool, False for slots that only fill up the batch; None: all valid.
        targets: assigned targets, or None for Hungarian matching.
        num_positives: of the assigned targets, in all micro-batches of an optimizer step; None
            where the source does not know it.
        proposals: encoder proposals that share the group's ground truth.
        truth_repeats: how many queries every ground truth is matched to.
        loss_weight: factor of every loss of the group.
        num_blocks: number of equal parts that do not see each other.
        sees: names of other groups that this one attends to.
        tokens: ``(B, Q)`` index of the encoder token that each query was made from; None where it
            was not made from one.
    """

    name: str
    content: Tensor
    position: Tensor | None
    reference: Tensor
    valid: Tensor | None = None
    targets: AssignedTargets | None = None
    num_positives: int | None = None
    proposals: EncoderProposals | None = None
    truth_repeats: int = 1
    loss_weight: float = 1.0
    num_blocks: int = 1
    sees: tuple[str, ...] = ()
    tokens: Tensor | None = None

    @property
    def num_queries(self) -> int:
        return self.content.shape[1]


@dataclass(frozen=True)
class QuerySet:
    """All groups of a step as one batch of queries for a single decoder pass.

    Attributes:
        content, position: ``(B, Q, C)``, position may be None; reference: ``(B, Q, 4 or 2)``.
        attend_mask: ``(Q, Q)`` or ``(B, 1, Q, Q)`` bool, True = may attend (the convention of
            ``scaled_dot_product_attention``); None when nothing has to be hidden.
        sizes: number of queries of each group, in order.
    """

    content: Tensor
    position: Tensor | None
    reference: Tensor
    attend_mask: Tensor | None
    sizes: list[int]

    @classmethod
    def concat(cls, groups: list[QueryGroup]) -> QuerySet:
        """Joins groups along the query axis; no query sees what its group does not let it see.

        Raises:
            ConfigError: if two groups share a name, only some have positional queries, some have
                points and some boxes as references, or a group sees one that does not exist.
        """
        names = [group.name for group in groups]
        shared = [name for name in names if names.count(name) > 1]
        if shared:
            raise ConfigError(
                f"two query groups are called {shared[0]}: give every source of model.queries a "
                "name of its own."
            )
        sizes = [group.num_queries for group in groups]
        positions = [group.position for group in groups if group.position is not None]
        if positions and len(positions) != len(groups):
            without = next(group.name for group in groups if group.position is None)
            raise ConfigError(
                f"query group {without} has no positional queries but others have: use sources of "
                "one kind in model.queries and model.auxiliary.positive_queries."
            )
        if len({group.reference.shape[-1] for group in groups}) > 1:
            points = next(group.name for group in groups if group.reference.shape[-1] == 2)
            raise ConfigError(
                f"query group {points} has reference points but others have boxes: customized "
                "positive queries and denoising need model.queries of boxes (TwoStageQueries)."
            )
        for group in groups:
            for other in group.sees:
                if other not in names:
                    raise ConfigError(
                        f"query group {group.name} sees the group {other}, but there are only "
                        f"{', '.join(names)}: correct the names in model.queries."
                    )
        return cls(
            content=torch.cat([group.content for group in groups], dim=1),
            position=torch.cat(positions, dim=1) if positions else None,
            reference=torch.cat([group.reference for group in groups], dim=1),
            attend_mask=_attend_mask(groups, sizes),
            sizes=sizes,
        )

    def split(self, predictions: Predictions) -> list[Predictions]:
        """Cuts decoded predictions back into one value per group."""
        return [
            Predictions(logits, boxes)
            for logits, boxes in zip(
                predictions.logits.split(self.sizes, dim=2),
                predictions.boxes.split(self.sizes, dim=2),
                strict=True,
            )
        ]


def _attend_mask(groups: list[QueryGroup], sizes: list[int]) -> Tensor | None:
    device = groups[0].content.device
    padded = [group for group in groups if group.valid is not None]
    if len(groups) == 1 and not padded and groups[0].num_blocks == 1:
        return None
    block, starts = [], {}
    for group, size in zip(groups, sizes, strict=True):
        starts[group.name] = sum(sizes[: len(starts)])
        length = max(1, size // group.num_blocks)
        # Block numbers need not follow each other: a query's number is one that no other group has.
        block.append(torch.arange(size, device=device) // length + starts[group.name])
    block = torch.cat(block)
    mask = block[:, None] == block[None, :]
    for group, size in zip(groups, sizes, strict=True):
        rows = slice(starts[group.name], starts[group.name] + size)
        for other, other_size in zip(groups, sizes, strict=True):
            if other.name in group.sees:
                mask[rows, starts[other.name] : starts[other.name] + other_size] = True
    if not padded:
        return mask
    batch = groups[0].content.shape[0]
    valid = torch.cat(
        [
            torch.ones(batch, size, dtype=torch.bool, device=device)
            if group.valid is None
            else group.valid
            for group, size in zip(groups, sizes, strict=True)
        ],
        dim=1,
    )
    # A padded slot still sees itself: a row without any key is NaN in some attention kernels.
    itself = torch.eye(len(mask), dtype=torch.bool, device=device)
    return ((mask & valid[:, None, :]) | itself)[:, None]


@dataclass(frozen=True)
class Candidates:
    """Everything an auxiliary head may turn into customized positive queries.

    Attributes:
        instances: per image, R candidates with the fields ``proposal_boxes`` (absolute),
            ``gt_classes`` (K = background, -1 = ignored) and ``gt_boxes`` (absolute; zeros
            where there is no match); with ``gt_weights`` (1 where there is no match) if those of
            the ground truth have some, see `loss_weights`.
        gather_features: ``(image index, candidate indices (n,)) -> (n, C)``. Features are
            gathered for the chosen candidates only, so that no (anchors x C) copy is made;
            gradients flow through them.
    """

    instances: list[Instances]
    gather_features: Callable[[int, Tensor], Tensor]

    @classmethod
    def of_detections(
        cls,
        detections: list[Instances],
        starts: list[Boxes],
        gather_features: Callable[[int, Tensor], Tensor],
    ) -> Candidates:
        """Detections with ``pred_boxes`` and ``pred_classes`` as candidates, in their order.

        Args:
            starts: per image what takes the place of ``proposal_boxes``. There is no ground truth
                at test time; the detections themselves stand in its place.
        """
        instances = [
            Instances(
                found.image_size,
                proposal_boxes=boxes,
                gt_classes=found.pred_classes,
                gt_boxes=found.pred_boxes,
            )
            for found, boxes in zip(detections, starts, strict=True)
        ]
        return cls(instances, gather_features)


@dataclass(frozen=True)
class HeadDetections:
    """What an auxiliary head detects in eval mode, and what queries can be made of it.

    Attributes:
        instances: per image ``pred_boxes`` (absolute, inside the image), ``scores`` and
            ``pred_classes``, best first; also ``pred_masks`` where the head has a mask branch.
        candidates: the same detections in the same order. A query starts from a box such as the
            head's candidates have in training: the decoder has learned how far that can be from
            the object. Features are gathered when they are asked for, so that a head that detects
            alone does not pay for them.
    """

    instances: list[Instances]
    candidates: Candidates


@dataclass(frozen=True)
class AuxiliaryOutput:
    """Losses of an auxiliary head, un-prefixed and already weighted, and its candidates."""

    losses: dict[str, Tensor]
    candidates: Candidates


@dataclass(frozen=True)
class TrainingOutput:
    """All that a training forward pass computed, kept for analysis and fidelity checks.

    Attributes:
        losses: weighted losses by their full names.
        memory: encoder output.
        groups: query groups in decoding order; predictions, targets: per group, same order.
        proposal_targets: assignment of the encoder proposals by group name.
        auxiliary: outputs of the auxiliary heads by name.
    """

    losses: dict[str, Tensor]
    memory: EncoderMemory
    groups: list[QueryGroup]
    predictions: list[Predictions]
    targets: list[AssignedTargets]
    proposal_targets: dict[str, AssignedTargets] = field(default_factory=dict)
    auxiliary: dict[str, AuxiliaryOutput] = field(default_factory=dict)


@dataclass(frozen=True)
class ClassRows:
    """How the first axis of a layer's tensors runs over the classes.

    A module whose layers have rows per class says so by ``class_layers``, a dict of such values by
    the names of its layers: then a checkpoint of other classes can be carried over by their names.

    Attributes:
        width: rows per class.
        background: whether a row for the background comes last.
        repeated: whether the rows of all classes come again for every anchor of a cell.
    """

    width: int = 1
    background: bool = False
    repeated: bool = False

    def rows(self, classes: int) -> int:
        """Rows for all classes, once."""
        return self.width * classes + int(self.background)

    def repeats(self, number: int, classes: int) -> int:
        """How often ``number`` rows have all classes; 0 if they do not."""
        repeats, rest = divmod(number, self.rows(classes))
        return 0 if rest or (repeats > 1 and not self.repeated) else repeats


@dataclass(frozen=True)
class HeadCounts:
    """What one auxiliary head counts in some images.

    Attributes:
        normalizers: ``(n,)`` sums that its losses are divided by, in the head's own order.
        positives: of each image, the candidates for positive queries.
    """

    normalizers: Tensor
    positives: list[int]

    @classmethod
    def join(cls, parts: Sequence[HeadCounts]) -> HeadCounts:
        """The counts of all images of the parts."""
        return cls(
            normalizers=sum(part.normalizers for part in parts),
            positives=[number for part in parts for number in part.positives],
        )


@dataclass(frozen=True)
class StepCounts:
    """What is counted in the images of a micro-batch, or of all of them in an optimizer step.

    A sum over positives divided by their number is not the mean of such quotients of parts. So all
    micro-batches of a step are counted first, and each then divides its sums by the counts of the
    whole step: what they give adds up to the losses of one large batch, and so do their gradients.

    * Matched and denoising queries are counted from the ground truths alone.
    * So is what auxiliary heads assign by anchors and ground truths (ATSS, RetinaNet, FCOS).
    * Others assign or weigh by what they predict (Faster R-CNN, PAA, GFL). Network and heads run
      once more for them, without gradients, so that they are exact as well; or they count for their
      micro-batch alone, as if all others were like it.
    * The same holds for how long a group of queries is, which is what the longest image needs.

    "Of the step" means: of all micro-batches of this process. As in the reference, other processes
    matter to normalizers only, which are averaged over them where they are used
    (`average_over_processes`).

    Attributes:
        num_truths: ground truths of each image.
        heads: by name of the auxiliary head; without those that were not run for it.
    """

    num_truths: list[int]
    heads: dict[str, HeadCounts] = field(default_factory=dict)

    @classmethod
    def join(cls, parts: Sequence[StepCounts]) -> StepCounts:
        """The counts of a step from those of its micro-batches."""
        return cls(
            num_truths=[number for part in parts for number in part.num_truths],
            heads={
                name: HeadCounts.join([part.heads[name] for part in parts])
                for name in parts[0].heads
            },
        )

    def share(self, num_images: int) -> float:
        """Of the step's images, that of a micro-batch: the weight of a loss that is a mean."""
        return num_images / len(self.num_truths)

    def num_matched(self, num_queries: int, repeats: int = 1) -> int:
        """Queries that are matched in all images, if each has so many of them.

        Args:
            repeats: how many queries every ground truth is matched to.
        """
        return sum(min(num_queries, repeats * number) for number in self.num_truths)


def tensor_on(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.tensor(values, dtype=dtype, device=device)`` without waiting for the device."""
    return to_device(torch.tensor(values, dtype=dtype), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor.to(device)`` without waiting for the device; work on the result is queued behind it.

    Plain copies come from pageable memory, and make the host wait for the whole queue. In a step
    that is done where costs are fetched for matching, not for a handful of sizes.
    """
    # Tracing has no memory to pin, and neither have the made-up devices of a machine without one.
    can_pin = torch.cuda.is_available() and not torch.compiler.is_compiling()
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu" and can_pin:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
