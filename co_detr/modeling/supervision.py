"""From decoded query groups to losses: targets for each group, then one criterion for all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from co_detr.modeling.criterion import SetCriterion, average_over_processes, name_layers
from co_detr.modeling.matching import HungarianAssigner, MatchingProblem
from co_detr.structures import AssignedTargets, GroundTruth, Predictions, QueryGroup


@dataclass(frozen=True)
class Assignment:
    """Targets of every group, in order, and of the encoder proposals by group name."""

    groups: list[AssignedTargets]
    proposals: dict[str, AssignedTargets]


def assign_targets(
    groups: list[QueryGroup],
    predictions: list[Predictions],
    ground_truth: list[GroundTruth],
    assigner: HungarianAssigner,
    num_classes: int,
) -> Assignment:
    """Matches, in one go, all groups and encoder proposals that have no targets yet."""
    as_object = [
        GroundTruth(torch.zeros_like(each.labels), each.boxes, each.image_size)
        for each in ground_truth
    ]
    problems = {}
    for index, (group, predicted) in enumerate(zip(groups, predictions, strict=True)):
        if group.targets is None:
            truth = [_repeated(each, group.truth_repeats) for each in ground_truth]
            problems[index] = MatchingProblem(predicted, truth, num_classes)
        if group.proposals is not None:
            truth = as_object if group.proposals.binary else ground_truth
            problems[group.name] = MatchingProblem(group.proposals.predictions, truth, num_classes)
    solved = dict(zip(problems, assigner(list(problems.values())), strict=True))
    return Assignment(
        groups=[
            solved[index] if group.targets is None else group.targets
            for index, group in enumerate(groups)
        ],
        proposals={name: value for name, value in solved.items() if isinstance(name, str)},
    )


def score_groups(
    groups: list[QueryGroup],
    predictions: list[Predictions],
    assignment: Assignment,
    image_sizes: list[tuple[int, int]],
    criterion: SetCriterion,
) -> dict[str, Tensor]:
    """Weighted losses of all groups and encoder proposals by their full names."""
    scored = [
        (group.name, group.loss_weight, predicted, assigned)
        for group, predicted, assigned in zip(groups, predictions, assignment.groups, strict=True)
    ]
    for group in groups:
        if group.proposals is not None:
            targets = assignment.proposals[group.name]
            scored.append((f"{group.name}.enc", 1.0, group.proposals.predictions, targets))
    # One reduction over processes for the normalisers of all groups.
    counts = [criterion.count_positives(assigned) for *_, assigned in scored]
    counts = average_over_processes(torch.cat(counts)).split([len(c) for c in counts])
    losses: dict[str, Tensor] = {}
    for (name, weight, predicted, assigned), count in zip(scored, counts, strict=True):
        terms = criterion(predicted, assigned, image_sizes, count)
        losses.update(name_layers(name, {key: value * weight for key, value in terms.items()}))
    return losses


def _repeated(truth: GroundTruth, times: int) -> GroundTruth:
    return GroundTruth(truth.labels.repeat(times), truth.boxes.repeat(times, 1), truth.image_size)
