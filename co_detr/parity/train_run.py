"""One training step of ours on a case's input, with everything the comparisons look at."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from co_detr.modeling import CoDETR
from co_detr.parity.case import Case
from co_detr.parity.feed import RecordedPermutations, recorded_draws, reference_samples
from co_detr.structures import TrainingOutput

HEADS = ("roi", "atss")  # in the reference's order: suffixes 0 and 1


@dataclass
class TrainingRun:
    """What one step computed; gradients are left on ``model``.

    Attributes:
        entries: the dump that fed the step.
        pyramid: maps that the auxiliary heads read, by name.
        hidden: ``(D, B, Q, C)`` decoder states of all groups.
        query_features: per head, ``(B, Q, C)`` features that entered the positive queries.
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
    query_features: list[Tensor]
    pooled: Tensor
    scores: Tensor
    deltas: Tensor
    objectness: list[Tensor]
    rpn_deltas: list[Tensor]
    draws: RecordedPermutations

    @property
    def reference_masks_rows(self) -> bool:
        """Whether the reference hid everything from some padded query, which makes NaN there."""
        masks = [each["attn_masks"] for each in self.entries["aux"]]
        return any(mask is not None and bool(mask.all(-1).any()) for mask in masks)


@dataclass
class _Recorder:
    """Forward hooks that keep inputs or outputs by name, for the last call of each module."""

    kept: dict[str, object] = field(default_factory=dict)
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
    for layer, module in enumerate(model.decoder.layers):
        recorder.output(f"hidden{layer}", module)
    for name in HEADS:
        recorder.input(f"features.{name}", model.auxiliary.positive_queries[name].feature_proj)
    with (
        EventStorage(),
        reference_samples(case, model, entries),
        recorded_draws(case, model, entries) as draws,
    ):
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
        hidden=torch.stack([kept[f"hidden{i}"] for i in range(model.decoder.num_layers)]),
        query_features=[kept[f"features.{name}"] for name in HEADS],
        pooled=kept["pooled"],
        scores=kept["predictor"][0],
        deltas=kept["predictor"][1],
        objectness=kept["rpn"][0],
        rpn_deltas=kept["rpn"][1],
        draws=draws,
    )
