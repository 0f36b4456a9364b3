"""One training step of ours, fed with the reference's random draws, proposals and samples.

Only what the reference drew at random, or what Detectron2's RPN and ROI heads decide differently by
design, is fed; each such entry is printed as ``given`` or ``known``. RPN anchors of a location come
ratio outside, size inside in mmdet, the other way in Detectron2.

The reference lays out its noise of denoising queries group by group: in each, all ground truths of
all images as positives, then all of them as negatives. Ours come in slot order,
``(B, blocks, 2, G)``, where images with fewer than G ground truths have empty slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from co_detr.modeling import CoDETR
from co_detr.modeling.mask_losses import SampledBoxes
from co_detr.modeling.masks import MaskPredictions, RefineMaskHead, Regions
from co_detr.modeling.queries import DenoisingQueries, PositiveQueries
from co_detr.modeling.queries.denoising import NoiseDraws
from co_detr.structures import Candidates, Predictions, QueryGroup, TrainingOutput
from tests.parity.oracle.golden import Case
from tests.parity.oracle.model import RATIOS, decoder_states

HEADS = ("roi", "atss")  # in the reference's order: suffixes 0 and 1


@dataclass
class TrainingRun:
    """What one step computed; gradients are left on ``model``.

    Attributes:
        entries: the dump that fed the step.
        pyramid: maps that the auxiliary heads read, by name.
        hidden: ``(D, B, Q, C)`` decoder states of all groups.
        query_features: by head, ``(B, Q, C)`` features of the positive queries.
        noised_labels: that the denoising queries embed; None where there are none.
        pooled: ``(P, C, 7, 7)`` ROI features; scores, deltas: the box predictor's output.
        objectness, rpn_deltas: RPN maps per level.
        draws: the replay of recorded random permutations, after the step.
        masks: of the mask head; None in a model without one.
    """

    case: Case
    entries: dict
    model: CoDETR
    images: ImageList
    output: TrainingOutput
    pyramid: dict[str, Tensor]
    hidden: Tensor
    query_features: dict[str, Tensor]
    noised_labels: Tensor | None
    pooled: Tensor
    scores: Tensor
    deltas: Tensor
    objectness: list[Tensor]
    rpn_deltas: list[Tensor]
    draws: RecordedPermutations
    masks: MaskRun | None = None

    @property
    def groups(self) -> dict[str, QueryGroup]:
        return {group.name: group for group in self.output.groups}

    @property
    def predictions(self) -> dict[str, Predictions]:
        """By name of the group."""
        return dict(zip(self.groups, self.output.predictions, strict=True))

    @property
    def states(self) -> dict[str, Tensor]:
        """``hidden`` by name of the group."""
        sizes = [group.num_queries for group in self.output.groups]
        return dict(zip(self.groups, self.hidden.split(sizes, dim=2), strict=True))

    @property
    def reference_masks_rows(self) -> bool:
        """Whether the reference hid everything from some padded query, which makes NaN there."""
        if self.case.is_dino:  # which does not use its mask
            return False
        masks = [entry["attn_masks"] for entry in self.entries["aux"]]
        return any(mask is not None and bool(mask.all(-1).any()) for mask in masks)


@dataclass
class _Recorder:
    """Forward hooks that keep inputs or outputs by name, for the last call of each module."""

    kept: dict[str, Any] = field(default_factory=dict)
    hooks: list = field(default_factory=list)

    def output(self, name: str, module: nn.Module) -> None:
        def keep(_module, _inputs, output):
            self.kept[name] = output

        self.hooks.append(module.register_forward_hook(keep))

    def input(self, name: str, module: nn.Module, number: int = 0) -> None:
        def keep(_module, inputs):
            self.kept[name] = inputs[number]

        self.hooks.append(module.register_forward_pre_hook(keep))

    def mask_head(self, head: RefineMaskHead | None) -> None:
        """Keeps what the parts of the head give, by the names of the modules; last calls."""
        if head is None:
            return
        for name, module in head.named_modules():
            self.output(f"mask_head.{name}" if name else "mask_head", module)
        self.input("mask_head.input", head, 1)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


@dataclass(frozen=True)
class MaskRun:
    """What the mask head computed in one step.

    Attributes:
        samples: chosen boxes of each image.
        regions, predictions: of all images.
        outputs: of every module of the head, by its name.
        gradients: of the head's losses alone, by parameter; those without a gradient are left out.
        token_gradients: the same of the encoder's output.
        head_gradients: of all auxiliary losses, for the encoder's output and the level that heads
            add. In the reference these read maps of their own, also for positive queries.
        draws: the replay of recorded permutations, after the step.
    """

    samples: list[SampledBoxes]
    regions: Regions
    predictions: MaskPredictions
    outputs: dict[str, Any]
    gradients: dict[str, Tensor]
    token_gradients: Tensor
    head_gradients: tuple[Tensor, Tensor]
    draws: RecordedPermutations

    @classmethod
    def of(
        cls,
        kept: dict[str, Any],
        model: CoDETR,
        output: TrainingOutput,
        draws: RecordedPermutations,
    ) -> MaskRun:
        others = (*output.auxiliary, *(f"{name}_queries" for name in output.auxiliary))
        losses = {
            groups: sum(v for k, v in output.losses.items() if k.partition(".")[0] in groups)
            for groups in (("mask_head",), ("mask_head", *others))
        }
        alone, together = losses.values()
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        tokens, *found = torch.autograd.grad(
            alone,
            [output.memory.tokens, *parameters.values()],
            retain_graph=True,
            allow_unused=True,
        )
        gradients = dict(zip(parameters, found, strict=True))
        return cls(
            samples=kept["mask_head.sampler"],
            regions=kept["mask_head.input"],
            predictions=kept["mask_head"],
            outputs={key.removeprefix("mask_head."): value for key, value in kept.items()},
            gradients={name: value for name, value in gradients.items() if value is not None},
            token_gradients=tokens,
            head_gradients=torch.autograd.grad(
                together, [output.memory.tokens, kept["pyramid"]["p7"]], retain_graph=True
            ),
            draws=draws,
        )


def run_training(case: Case, model: CoDETR, entries: dict) -> TrainingRun:
    """Forward and backward pass, fed with the draws in ``entries`` (a ``train`` dump)."""
    images, truth = case.images(), case.ground_truth()
    model.train()
    recorder = _Recorder()
    roi = model.auxiliary.heads["roi"]
    recorder.output("pyramid", model.auxiliary.pyramid)
    recorder.output("rpn", roi.rpn.rpn_head)
    recorder.output("pooled", roi.roi_heads.box_pooler)
    recorder.output("predictor", roi.roi_heads.box_predictor)
    recorder.mask_head(model.mask_head)
    sources = [source for source in model.queries.values() if isinstance(source, DenoisingQueries)]
    with ExitStack() as stack:
        stack.enter_context(EventStorage())
        stack.enter_context(reference_samples(case, model, entries))
        draws = stack.enter_context(recorded_draws(case, model, entries))
        for source in sources:
            recorder.input("noised_labels", source.label_embedding)
            noise, num_gts = entries["dn"].get("raw_draws", {}), case.num_gts
            stack.enter_context(recorded_noise(source, noise, num_gts))
        states = stack.enter_context(decoder_states(model))
        slots = {
            name: stack.enter_context(_kept_slots(source))
            for name, source in model.auxiliary.positive_queries.items()
        }
        mask_draws = stack.enter_context(recorded_mask_draws(model, entries))
        output = model.forward_training(images, truth)
        kept = recorder.kept
        masks = None
        if model.mask_head is not None:
            masks = MaskRun.of(kept, model, output, mask_draws)
        sum(output.losses.values()).backward()
    recorder.remove()
    return TrainingRun(
        case=case,
        entries=entries,
        model=model,
        images=images,
        output=output,
        pyramid=kept["pyramid"],
        hidden=torch.stack(states.outputs),
        query_features={
            name: _gather(output.auxiliary[name].candidates, chosen)
            for name, chosen in slots.items()
        },
        noised_labels=kept.get("noised_labels"),
        pooled=kept["pooled"],
        scores=kept["predictor"][0],
        deltas=kept["predictor"][1],
        objectness=kept["rpn"][0],
        rpn_deltas=kept["rpn"][1],
        draws=draws,
        masks=masks,
    )


@contextmanager
def _kept_slots(source: PositiveQueries) -> Iterator[list]:
    """The list that is given receives the choice of every image's candidates."""
    kept, choose = [], source._choose

    def choose_and_keep(*arguments):
        kept.extend(choose(*arguments))
        return kept

    source._choose = choose_and_keep
    try:
        yield kept
    finally:
        del source._choose


def _gather(candidates: Candidates, chosen: list) -> Tensor:
    """Features of the chosen candidates, also of a model that does not use them (Co-DINO)."""
    return torch.stack(
        [
            slots.fill(candidates.gather_features(image, slots.indices))
            for image, slots in enumerate(chosen)
        ]
    )


class RecordedPermutations:
    """Stands in for ``torch.randperm``, replaying what the reference drew in its order.

    Attributes:
        remaining: what our code did not ask for so far.
        num_shorter: how many draws were of fewer things than ours.
    """

    def __init__(self, recorded: list[Tensor]):
        self.remaining = list(recorded)
        self.num_shorter = 0

    def draw(self, number: int, lacks: frozenset[int] = frozenset()) -> Tensor:
        """The next permutation, which must be one of ``number`` things.

        Args:
            lacks: by how many it may be shorter.

        Raises:
            RuntimeError: if the reference drew something else, or nothing any more.
        """
        if not self.remaining:
            raise RuntimeError(f"Our code draws a permutation of {number} that was not recorded.")
        permutation = self.remaining.pop(0)
        self.num_shorter += len(permutation) < number
        if number - len(permutation) not in {0, *lacks}:
            raise RuntimeError(
                f"Our code draws a permutation of {number}, the reference of {len(permutation)}."
            )
        return permutation


def sampler_draws(case: Case, entries: dict) -> list[int]:
    """Lengths of the permutations that the reference's samplers drew: RPN first, then ROI.

    A sampler draws for an image's positives, then for its negatives, each only if it may not keep
    them all.
    """
    lengths = []
    for assigned, sampled in zip(entries["rpn"]["assign"], entries["rpn"]["sampled"], strict=True):
        found = assigned["gt_inds_all"]
        for available, kept in (
            ((found > 0).sum(), sampled["num_pos"]),
            ((found == 0).sum(), sampled["num_neg"]),
        ):
            lengths += [int(available)] if available > kept else []
    roi = zip(entries["roi"]["assign"], entries["roi"]["sampling"], strict=True)
    for gt_labels, (assigned, sampled) in zip(case.own["gt_labels"], roi, strict=True):
        found = assigned["gt_inds"]
        for available, kept in (
            ((found > 0).sum() + len(gt_labels), sampled["pos_inds"]),
            ((found == 0).sum(), sampled["neg_inds"]),
        ):
            lengths += [int(available)] if available > len(kept) else []
    return lengths


def missing_fillers(entries: dict) -> frozenset[int]:
    """By how many background samples the reference's pools are smaller than ours (``roi-trim``)."""
    counts = [
        len(entry["pos_inds"]) + len(entry["neg_inds"]) for entry in entries["roi"]["sampling"]
    ]
    return frozenset(count - min(counts) for count in counts)


@contextmanager
def recorded_draws(case: Case, model: CoDETR, entries: dict) -> Iterator[RecordedPermutations]:
    """Replays the recorded permutations for all sources of positive queries.

    Raises:
        RuntimeError: unless the record starts with what the samplers must have drawn.
    """
    recorded = entries["aux_randperms"]
    samplers = sampler_draws(case, entries)
    first = [len(permutation) for permutation in recorded[: len(samplers)]]
    if first != samplers:
        raise RuntimeError(f"Recorded draws of {first} where samplers must have drawn {samplers}.")
    replay = RecordedPermutations(recorded[len(samplers) :])
    sources = model.auxiliary.positive_queries
    for name, source in sources.items():
        lacks = missing_fillers(entries) if name == "roi" else frozenset()
        source.permutation = partial(replay.draw, lacks=lacks)
    try:
        yield replay
    finally:
        for source in sources.values():
            source.permutation = torch.randperm


@contextmanager
def recorded_mask_draws(model: CoDETR, entries: dict) -> Iterator[RecordedPermutations]:
    """Replays the recorded permutations for the sampler of the mask head."""
    replay = RecordedPermutations(entries.get("mask_randperms", []))
    sampler = None if model.mask_head is None else model.mask_head.sampler
    if sampler is not None:
        sampler.permutation = replay.draw
    try:
        yield replay
    finally:
        if sampler is not None:
            sampler.permutation = torch.randperm


@contextmanager
def reference_samples(case: Case, model: CoDETR, entries: dict) -> Iterator[None]:
    """Makes the model's heads use the RPN labels and ROI samples of the dump ``entries``."""
    roi = model.auxiliary.heads["roi"]
    rpn, roi_heads = roi.rpn, roi.roi_heads
    saved = rpn.batch_size_per_image
    rpn.label_and_sample_anchors = lambda anchors, gts: rpn_labels(case, rpn, entries["rpn"])
    # Difference by design ``rpn-normalizer``: what our loss divides by is set to the reference's.
    targets = entries["rpn"]["targets"]
    total = targets["num_total_pos"] + targets["num_total_neg"]
    rpn.batch_size_per_image = total / len(case.image_sizes)
    roi_heads.label_and_sample_proposals = lambda proposals, gts: roi_samples(case, entries["roi"])
    try:
        yield
    finally:
        del rpn.label_and_sample_anchors, roi_heads.label_and_sample_proposals
        rpn.batch_size_per_image = saved


def rpn_labels(case: Case, rpn: RPN, entries: dict) -> tuple[list[Tensor], list[Tensor]]:
    """The reference's anchor labels and matched boxes, in Detectron2's order and meaning."""
    targets = entries["targets"]
    order = level_order(
        [labels.shape[1] for labels in targets["labels"]], rpn.anchor_generator.num_anchors[0]
    )
    labels, boxes = [], []
    for image, gt_boxes in enumerate(case.own["gt_boxes_xyxy"]):
        background = torch.cat([level[image] for level in targets["labels"]])  # 0 means object
        used = torch.cat([level[image] for level in targets["label_weights"]]) > 0
        label = torch.where(used, 1 - background, -1)[order]
        labels.append(label.to(torch.int8))
        found = entries["assign"][image]["gt_inds_all"][order]
        padded = torch.cat([gt_boxes, gt_boxes.new_zeros(1, 4)])
        boxes.append(padded[torch.where(found > 0, found - 1, len(gt_boxes))])
    return labels, boxes


def roi_samples(case: Case, entries: dict) -> list[Instances]:
    """The reference's sampled proposals with their targets."""
    rois, targets = entries["rois"], entries["targets"]
    samples = []
    for image, size in enumerate(case.image_sizes):
        here = rois[:, 0] == image
        samples.append(
            Instances(
                size,
                proposal_boxes=Boxes(rois[here, 1:]),
                gt_classes=targets["labels"][here],
                gt_boxes=Boxes(targets["bbox_targets"][here]),
            )
        )
    return samples


def flat_slots(num_gts: list[int], num_blocks: int) -> Tensor:
    """Our slot, counted over the batch, of each noised ground truth of the reference: ``(M,)``."""
    longest = max(num_gts)
    slots = torch.arange(len(num_gts) * num_blocks * 2 * longest)
    slots = slots.view(len(num_gts), num_blocks, 2, longest).permute(1, 2, 0, 3)
    is_real = torch.arange(longest) < torch.tensor(num_gts)[:, None]
    return slots[:, :, is_real].flatten()


@contextmanager
def recorded_noise(
    source: DenoisingQueries, raw: dict[str, Tensor], num_gts: list[int]
) -> Iterator[None]:
    """Makes ``source`` use the draws ``raw`` of a step with these numbers of ground truths.

    Raises:
        RuntimeError: if the reference drew another number of them than our queries need.
    """

    def draw(boxes: Tensor) -> NoiseDraws:
        longest = max(num_gts)
        num_blocks = len(boxes) // max(2 * longest * len(num_gts), 1)
        places = flat_slots(num_gts, num_blocks)
        if not longest:  # nothing to draw, and so perhaps nothing recorded
            return NoiseDraws(boxes[:, 0], boxes[:, 0].long(), boxes, boxes)
        counts = {name: len(raw[name]) for name in ("label_uniform", "box_sign01", "box_uniform")}
        if set(counts.values()) != {len(places)}:
            raise RuntimeError(f"Our code noises {len(places)} boxes, the reference drew {counts}.")
        flip = _spread(raw["label_uniform"], places, boxes, empty=1.0)
        return NoiseDraws(
            flip=flip,
            labels=_replacements(source, raw, places, flip),
            signs=_spread(raw["box_sign01"] * 2 - 1, places, boxes),
            shifts=_spread(raw["box_uniform"], places, boxes),
        )

    source.draw = draw
    try:
        yield
    finally:
        del source.draw


def _spread(values: Tensor, places: Tensor, boxes: Tensor, empty: float = 0.0) -> Tensor:
    """``(M, ...)`` draws of real slots -> ``(N, ...)`` of all."""
    spread = boxes.new_full((len(boxes), *values.shape[1:]), empty)
    spread[places] = values.to(spread.dtype)
    return spread


def _replacements(
    source: DenoisingQueries, raw: dict[str, Tensor], places: Tensor, flip: Tensor
) -> Tensor:
    """The reference draws classes for those labels only that it replaces."""
    replaced = places[raw["label_uniform"] < 0.5 * source.label_noise]
    if len(replaced) != len(raw["label_new"]):
        raise RuntimeError(
            f"Our code replaces {len(replaced)} labels, the reference {len(raw['label_new'])}."
        )
    labels = torch.zeros_like(flip, dtype=torch.long)
    labels[replaced] = raw["label_new"]
    return labels


def level_order(counts: list[int], num_anchors: int) -> Tensor:
    """Index that turns the reference's rows into Detectron2's, ``detectron2 = reference[order]``.

    Args:
        counts: anchors per level; num_anchors: anchors per location.
    """
    within = torch.arange(num_anchors).view(RATIOS, -1).t().flatten()
    cells = torch.arange(sum(counts) // num_anchors)
    return (cells[:, None] * num_anchors + within).flatten()


def to_reference(rows: Tensor, order: Tensor) -> Tensor:
    """Detectron2's rows ``(R, ...)`` in the reference's order."""
    out = torch.empty_like(rows)
    out[order] = rows
    return out


def channels_to_reference(maps: Tensor, num_anchors: int) -> Tensor:
    """Detectron2's maps ``(B, A * width, H, W)`` in the reference's order."""
    grouped = maps.unflatten(1, (num_anchors // RATIOS, RATIOS, -1))
    return grouped.transpose(1, 2).flatten(1, 3)
