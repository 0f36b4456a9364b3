"""From decoded query groups to losses: targets for each group, then one criterion for all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from co_detr.modeling.criterion import SetCriterion, average_over_processes, name_layers
from co_detr.modeling.matching import HungarianAssigner, MatchingProblem
from co_detr.structures import AssignedTargets, GroundTruth, Predictions, QueryGroup, StepCounts


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


@dataclass(frozen=True)
class _Scored:
    """What is scored by itself: a group of queries or encoder proposals.

    Attributes:
        num_positives: in all micro-batches of the step; None: as many on average as in this one.
    """

    name: str
    loss_weight: float
    predictions: Predictions
    targets: AssignedTargets
    num_positives: int | None


def score_groups(
    groups: list[QueryGroup],
    predictions: list[Predictions],
    assignment: Assignment,
    image_sizes: list[tuple[int, int]],
    criterion: SetCriterion,
    counts: StepCounts | None = None,
) -> dict[str, Tensor]:
    """Weighted losses of all groups and encoder proposals by their full names.

    Args:
        counts: of the whole step, to which the losses are then a contribution; None: this batch is
            all of it.
    """
    scored = [
        _Scored(group.name, group.loss_weight, predicted, assigned, _num_positives(group, counts))
        for group, predicted, assigned in zip(groups, predictions, assignment.groups, strict=True)
    ]
    for group in groups:
        if group.proposals is not None:
            predicted, targets = group.proposals.predictions, assignment.proposals[group.name]
            number = None if counts is None else counts.num_matched(predicted.boxes.shape[2])
            scored.append(_Scored(f"{group.name}.enc", 1.0, predicted, targets, number))
    # One reduction over processes for the normalisers of all groups.
    totals = [_positives_of_layers(each, criterion, counts) for each in scored]
    totals = average_over_processes(torch.cat(totals)).split([len(each) for each in totals])
    losses: dict[str, Tensor] = {}
    for each, total in zip(scored, totals, strict=True):
        terms = criterion(each.predictions, each.targets, image_sizes, total)
        terms = {key: value * each.loss_weight for key, value in terms.items()}
        losses.update(name_layers(each.name, terms))
    return losses


def _num_positives(group: QueryGroup, counts: StepCounts | None) -> int | None:
    if counts is None or group.targets is not None:
        return group.num_positives
    return counts.num_matched(group.num_queries, group.truth_repeats)


def _positives_of_layers(
    each: _Scored, criterion: SetCriterion, counts: StepCounts | None
) -> Tensor:
    """``(D,)`` in all micro-batches of the step."""
    targets = each.targets
    if counts is None:
        return criterion.count_positives(targets)
    if each.num_positives is None:
        return criterion.count_positives(targets) / counts.share(targets.labels.shape[1])
    return targets.boxes.new_full((len(targets.labels),), each.num_positives)


def _repeated(truth: GroundTruth, times: int) -> GroundTruth:
    return GroundTruth(truth.labels.repeat(times), truth.boxes.repeat(times, 1), truth.image_size)
