"""One training step of ours on a case's input, with everything the comparisons look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from co_detr.modeling import CoDETR
from co_detr.modeling.queries import DenoisingQueries, PositiveQueries
from co_detr.parity.capture import decoder_states
from co_detr.parity.case import Case
from co_detr.parity.feed import RecordedPermutations, recorded_draws, reference_samples
from co_detr.parity.noise import recorded_noise
from co_detr.structures import Candidates, Predictions, QueryGroup, TrainingOutput

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
        masks = [each["attn_masks"] for each in self.entries["aux"]]
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

    def input(self, name: str, module: nn.Module) -> None:
        def keep(_module, inputs):
            self.kept[name] = inputs[0]

        self.hooks.append(module.register_forward_pre_hook(keep))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


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
    sources = [source for source in model.queries if isinstance(source, DenoisingQueries)]
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
        output = model.training_step(images, truth)
        sum(output.losses.values()).backward()
    recorder.remove()
    kept = recorder.kept
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
