"""Which query is matched to which object, and how much that changes between checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Instances
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from co_detr.checkpoint.detector import read_weights
from co_detr.checkpoint.loading import load_weights
from co_detr.modeling import CoDETR
from co_detr.modeling.losses import normalize_boxes, solve_assignment
from co_detr.structures import EncoderMemory, GroundTruth, QuerySet
from co_detr.tools.analyze.report import Chart, Section, Table
from co_detr.tools.analyze.subjects import Progress, Sample, Subject

Matching = Mapping[int, int]
_TEXT = """The instability of an image between two checkpoints is the number of queries that are \
matched to another object than before, or that won or lost one. 0 is a matching that does not \
change; every object that moves from one query to another counts twice, so that twice the number \
of objects is about the most. A query whose target keeps changing is taught contradictory things.

By query is the definition of the paper: query number n of one checkpoint is compared with query n \
of the next. In a model with two stages, query n is only the n-th best proposal, and its number \
changes with the ranking. By token therefore compares the encoder tokens that the queries were \
made from, which are places in the image.

The auxiliary heads are left out: where an assignment follows from the boxes alone (ATSS, FCOS, \
RetinaNet), it never changes. Values of two runs can be compared only if the checkpoints lie as \
far apart in both.

Source: DN-DETR (Li et al., CVPR 2022), section 3 ("IS")."""


@dataclass(frozen=True)
class QueryMatching:
    """One-to-one matching of Q queries in one image.

    Attributes:
        truths: ``(Q,)`` index of the matched ground truth, -1 for none.
        tokens: ``(Q,)`` encoder token that each query was made from; None where queries are not
            made from tokens.
    """

    truths: np.ndarray
    tokens: np.ndarray | None


def match_queries(model: CoDETR, memory: EncoderMemory, truth: Instances) -> QueryMatching:
    """Matches the last decoder layer, as training does, in a batch of one image.

    Args:
        model: in any mode.
        memory: encoder output.
        truth: ``gt_boxes`` in absolute pixels of the network input, and ``gt_classes``.
    """
    group = model.inference_source(memory)
    predictions = model.decoder(QuerySet.concat([group]), memory)
    factor = memory.geometry.factors[0]
    normalized = normalized_truth(truth, factor, predictions.boxes)
    cost = model.assigner.cost(predictions, 0, GroundTruth(truth.gt_classes, normalized, factor))
    # As in the assigner: a diverged model has NaN costs, and any assignment will do.
    host = np.nan_to_num(cost[-1:].cpu().numpy(), nan=1e5, posinf=1e5, neginf=-1e5)
    tokens = None if group.tokens is None else group.tokens[0].cpu().numpy()
    return QueryMatching(solve_assignment(host)[0], tokens)


def normalized_truth(truth: Instances, factor: Tensor, like: Tensor) -> Tensor:
    """Normalized boxes ``(G, 4)`` of a ground truth, in the type of `like`."""
    return normalize_boxes(truth.gt_boxes.tensor.to(like.dtype), factor)


@dataclass(frozen=True)
class Interval:
    """Mean per image between two checkpoints; ``by_token`` is None for queries without tokens."""

    start: int
    end: int
    by_query: float
    by_token: float | None


def measure_instability(
    subjects: Sequence[Subject], samples: Sequence[Sample], progress: Progress
) -> Section:
    """Instability of the decoder's matching between consecutive checkpoints of each run."""
    objects = float(np.mean([len(sample.input["instances"]) for sample in samples]))
    intervals = {subject.name: intervals_of(subject, samples, progress) for subject in subjects}
    remarks = [
        f"{subject.name} has no decoder, so that nothing is matched."
        if subject.model.decoder is None
        else f"{subject.name} has fewer than two checkpoints, so that nothing can be compared: "
        "train with a lower train.checkpointer.period and a higher "
        "train.checkpointer.max_to_keep, and name the run's folder."
        for subject in subjects
        if not intervals[subject.name]
    ]
    measured = any(intervals.values())
    return Section(
        key="instability",
        title="Instability of the matching",
        text="\n\n".join([_TEXT, *remarks]),
        numbers={
            "objects_per_image": objects,
            "intervals": {
                name: [vars(interval) for interval in found] for name, found in intervals.items()
            },
        },
        tables=(_table(intervals, objects),) if measured else (),
        charts=(
            Chart(
                "instability",
                "Mean instability per image between neighboring checkpoints. Dotted: twice the "
                "number of objects.",
                _lines(intervals, objects),
            ),
        )
        if measured
        else (),
    )


def intervals_of(subject: Subject, samples: Sequence[Sample], progress: Progress) -> list[Interval]:
    """Compares each checkpoint of a run with the one before it."""
    if len(subject.checkpoints) < 2 or subject.model.decoder is None:
        return []
    model = copy.deepcopy(subject.model)
    model.strip_auxiliary()
    found: list[Interval] = []
    before: tuple[int, list[QueryMatching]] | None = None
    for path in subject.checkpoints:
        content = read_weights(str(path), subject.cfg)
        iteration = _iteration(content, path)
        if before is not None and iteration == before[0]:
            continue  # the final checkpoint may be the last numbered one once more
        load_weights(model, content, str(path), parts="inference")
        matchings = _match_all(model, samples, progress)
        if before is not None:
            found.append(_compare(before, (iteration, matchings)))
        before = iteration, matchings
    return found


def _iteration(content: Mapping, path: Path) -> int:
    """Steps done; a run notes the last iteration, which counts from 0."""
    noted = content.get("iteration")
    return int(path.stem.rpartition("_")[2]) + 1 if noted is None else int(noted) + 1


@torch.no_grad()
def _match_all(model, samples: Sequence[Sample], progress: Progress) -> list[QueryMatching]:
    matchings = []
    for sample in progress(samples):
        memory = model.encode(model.preprocess([sample.input]))
        matchings.append(match_queries(model, memory, sample.input["instances"].to(model.device)))
    return matchings


def _compare(
    before: tuple[int, list[QueryMatching]], after: tuple[int, list[QueryMatching]]
) -> Interval:
    pairs = list(zip(before[1], after[1], strict=True))
    by_query = [instability(by_number(old), by_number(new)) for old, new in pairs]
    by_token = None
    if all(matching.tokens is not None for pair in pairs for matching in pair):
        by_token = np.mean([instability(by_place(old), by_place(new)) for old, new in pairs])
    return Interval(
        before[0],
        after[0],
        float(np.mean(by_query)),
        None if by_token is None else float(by_token),
    )


def by_number(matching: QueryMatching) -> Matching:
    """Number of a matched query -> its ground truth."""
    return {int(n): int(matching.truths[n]) for n in np.flatnonzero(matching.truths >= 0)}


def by_place(matching: QueryMatching) -> Matching:
    """Encoder token of a matched query -> its ground truth."""
    return {int(matching.tokens[n]): truth for n, truth in by_number(matching).items()}


def instability(before: Matching, after: Matching) -> int:
    """Number of keys with another ground truth; a missing key has none."""
    return sum(before.get(key) != after.get(key) for key in before.keys() | after.keys())


def _table(intervals: dict[str, list[Interval]], objects: float) -> Table:
    rows = tuple(
        (name, interval.start, interval.end, interval.by_query, interval.by_token)
        for name, found in intervals.items()
        for interval in found
    )
    return Table(
        "instability",
        f"Mean instability per image; an image has {objects:.1f} objects on average.",
        ("model", "from iteration", "to iteration", "by query", "by token"),
        rows,
    )


def _lines(intervals: dict[str, list[Interval]], objects: float) -> Figure:
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, ("by_query", "by_token"), strict=True):
        for index, (name, found) in enumerate(intervals.items()):
            points = [(interval.end, getattr(interval, kind)) for interval in found]
            points = [point for point in points if point[1] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=name, color=f"C{index}")
        axes.axhline(2 * objects, color="0.5", linestyle=":")
        axes.set_title(kind.replace("_", " "), fontsize=10)
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("instability per image")
    panels[0].legend(fontsize=8)
    return figure
