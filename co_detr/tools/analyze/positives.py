"""How many positive queries each object gets, from each source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from matplotlib.figure import Figure
from torch import Tensor

from co_detr.engine.validation import training_without_trace
from co_detr.modeling import CoDETR
from co_detr.seeding import seed_everything
from co_detr.tools.analyze.matching import match_queries, normalized_truth
from co_detr.tools.analyze.report import Chart, Section, Table
from co_detr.tools.analyze.subjects import Progress, Sample, Subject

MATCHED = "matched queries"
# COCO's limits of area, in pixels of the network input.
SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, float("inf"))}

_TEXT = """The decoder's own queries are matched one to one: each object is the target of one \
query. An auxiliary head assigns many candidates (anchors, points, proposals) to an object, and \
each becomes a positive query of the decoder while training. This is how many there are per \
object; an object with none gets nothing from that head.

They are counted with the assignment of training, on images as the evaluation resizes them. Heads \
whose assignment follows their predictions, or that draw a random sample (Faster R-CNN), depend on \
the weights and the seed. Small, medium and large are COCO's areas (32 and 96 pixels squared) in \
pixels of the network input. "As queries" is the mean after the limit on queries per image and \
head (max_queries).

Source: Co-DETR (Zong et al., ICCV 2023), sections 3.2 and 3.3."""


@dataclass(frozen=True)
class PositiveCounts:
    """Per ground truth, in the order of images.

    Attributes:
        areas: ``(G,)`` pixels squared of the network input.
        counts: by source, ``(G,)`` candidates that it assigned to each.
        queries: by source, ``(G,)`` of these that became queries.
    """

    areas: np.ndarray
    counts: dict[str, np.ndarray]
    queries: dict[str, np.ndarray]

    def sized(self, name: str) -> np.ndarray:
        """``(G,)`` bool: the ground truths of a size in `SIZES`."""
        low, high = SIZES[name]
        return (self.areas >= low) & (self.areas < high)


def measure_positives(
    subjects: Sequence[Subject], samples: Sequence[Sample], progress: Progress
) -> Section:
    """Positive queries per ground truth of each auxiliary head and of the matching."""
    counted = {
        subject.name: count_positives(subject.model, samples, progress) for subject in subjects
    }
    text = _TEXT
    for part in ("auxiliary", "decoder"):
        lacking = [subject.name for subject in subjects if getattr(subject.model, part) is None]
        if lacking:
            kind = "auxiliary heads" if part == "auxiliary" else "matched queries"
            text += f"\n\nWithout {kind}: {', '.join(lacking)}."
    if not any(len(counted_positives.areas) for counted_positives in counted.values()):
        text = "The images have no ground truth, so that nothing is assigned."
        return Section("positives", "Positive queries per object", text, {})
    return Section(
        key="positives",
        title="Positive queries per object",
        text=text,
        numbers={name: _summary(positives) for name, positives in counted.items()},
        tables=(_table(counted),),
        charts=(
            Chart(
                "histogram",
                "Share of objects that get so many positive queries, by source.",
                _histogram(counted),
            ),
        ),
    )


def count_positives(
    model: CoDETR, samples: Sequence[Sample], progress: Progress = lambda samples: samples
) -> PositiveCounts:
    """Counts what a training step would assign; the model and all generators stay as they are."""
    sources = [] if model.decoder is None else [MATCHED]
    sources += [] if model.auxiliary is None else list(model.auxiliary.heads)
    areas: list[np.ndarray] = []
    counts: dict[str, list[np.ndarray]] = {name: [] for name in sources}
    queries: dict[str, list[np.ndarray]] = {name: [] for name in sources}
    seed = torch.initial_seed()
    with training_without_trace(model, model.device), EventStorage(), torch.no_grad():
        for number, sample in enumerate(progress(samples)):
            seed_everything("positive queries", seed, number)
            truth = sample.input["instances"].to(model.device)
            areas.append(truth.gt_boxes.area().cpu().numpy())
            for name, counted in _count_image(model, sample.input, truth).items():
                counts[name].append(counted.assigned)
                queries[name].append(counted.queries)
    return PositiveCounts(
        _joined(areas),
        {name: _joined(parts) for name, parts in counts.items()},
        {name: _joined(parts) for name, parts in queries.items()},
    )


class _Counts(NamedTuple):
    """Of each object of an image, ``(G,)``: candidates that a source assigned to it, and those of
    them that became its queries."""

    assigned: np.ndarray
    queries: np.ndarray


def _count_image(model: CoDETR, batched_input: dict, truth: Instances) -> dict[str, _Counts]:
    """By source."""
    images = model.preprocess([batched_input])
    memory = model.encode(images)
    found = {}
    if model.decoder is not None:
        matched = match_queries(model, memory, truth).truths
        each_once = np.bincount(matched[matched >= 0], minlength=len(truth))
        found[MATCHED] = _Counts(each_once, each_once)
    if model.auxiliary is None:
        return found
    size = tuple(images.image_sizes[0])
    gt_instances = Instances(size, gt_boxes=truth.gt_boxes, gt_classes=truth.gt_classes)
    branch = model.auxiliary(images, memory, [gt_instances])
    groups = {group.name: group for group in branch.groups}
    for name, output in branch.outputs.items():
        candidates = output.candidates.instances[0]
        assigned = count_per_truth(
            candidates.gt_classes,
            candidates.gt_boxes.tensor,
            truth.gt_classes,
            truth.gt_boxes.tensor,
        )
        used = np.zeros_like(assigned)
        group = groups.get(f"{name}_queries")
        if group is not None:
            targets = group.targets
            boxes = normalized_truth(truth, memory.geometry.factors[0], targets.boxes)
            used = count_per_truth(
                targets.labels[0, 0], targets.boxes[0, 0], truth.gt_classes, boxes
            )
        found[name] = _Counts(assigned, used)
    return found


def count_per_truth(
    labels: Tensor, boxes: Tensor, truth_labels: Tensor, truth_boxes: Tensor
) -> np.ndarray:
    """How many of N targets are each of G ground truths, ``(G,)``.

    A target is the ground truth whose label and box it copies; of equal ones, the first.

    Args:
        labels, boxes: ``(N,)`` and ``(N, 4)`` of the targets.
        truth_labels, truth_boxes: ``(G,)`` and ``(G, 4)``, in the same unit and type.
    """
    if not len(truth_labels):
        return np.zeros(0, dtype=np.int64)
    same = labels[:, None] == truth_labels[None]
    same &= (boxes[:, None] == truth_boxes[None]).all(-1)  # (N, G)
    index = same.int().argmax(1)[same.any(1)]
    return torch.bincount(index, minlength=len(truth_labels)).cpu().numpy()


def _joined(images: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(images) if images else np.zeros(0)


def _summary(counted: PositiveCounts) -> dict:
    def describe(counts: np.ndarray) -> dict:
        if not len(counts):
            return {"objects": 0}
        return {
            "objects": len(counts),
            "mean": float(counts.mean()),
            "median": float(np.median(counts)),
            "maximum": int(counts.max()),
            "share_without": float((counts == 0).mean()),
        }

    return {
        source: {
            "all": describe(counts),
            **{size: describe(counts[counted.sized(size)]) for size in SIZES},
            "mean_as_queries": describe(counted.queries[source]).get("mean"),
            "histogram": np.bincount(counts).tolist(),
        }
        for source, counts in counted.counts.items()
    }


def _table(counted: dict[str, PositiveCounts]) -> Table:
    rows = []
    for name, positives in counted.items():
        for source, summary in _summary(positives).items():
            everything = summary["all"]
            rows.append(
                (
                    name,
                    source,
                    everything.get("mean"),
                    everything.get("median"),
                    everything.get("maximum"),
                    everything.get("share_without"),
                    *(summary[size].get("mean") for size in SIZES),
                    summary["mean_as_queries"],
                )
            )
    objects = next(iter(counted.values()))
    numbers = ", ".join(f"{int(objects.sized(size).sum())} {size}" for size in SIZES)
    return Table(
        "positives",
        f"Positive queries per object, of {len(objects.areas)} objects ({numbers}).",
        (
            *("model", "source", "mean", "median", "most", "share without"),
            *(f"mean, {size}" for size in SIZES),
            "mean, as queries",
        ),
        tuple(rows),
    )


def _histogram(counted: dict[str, PositiveCounts]) -> Figure:
    """One panel for each model; a source keeps its color in all of them."""
    sources = list(
        dict.fromkeys(name for positives in counted.values() for name in positives.counts)
    )
    longest = max(int(c.max()) for positives in counted.values() for c in positives.counts.values())
    figure = Figure(figsize=(8, 0.6 + 2.3 * len(counted)), layout="constrained")
    panels = figure.subplots(len(counted), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, positives) in zip(panels, counted.items(), strict=True):
        for source, counts in positives.counts.items():
            share = np.bincount(counts, minlength=longest + 1) / len(counts)
            axes.stairs(
                share,
                np.arange(longest + 2) - 0.5,
                label=source,
                color=f"C{sources.index(source)}",
                fill=source == MATCHED,
                alpha=0.5 if source == MATCHED else 1.0,
                linewidth=1.5,
            )
        axes.set_title(name, fontsize=10)
        axes.set_ylabel("share of objects")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[-1].set_xlabel("positive queries per object")
    return figure
