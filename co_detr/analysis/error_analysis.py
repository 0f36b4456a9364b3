"""What keeps a model from a perfect AP at IoU 0.5, by kind of error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.structures import Instances
from matplotlib.figure import Figure

from co_detr.analysis.error_types import (
    BACKGROUND_IOU,
    FOREGROUND_IOU,
    MAX_DETECTIONS,
    ErrorWeights,
    ImageResult,
    Judgement,
    judge_image,
    weigh_errors,
)
from co_detr.analysis.section import Chart, Section, Table
from co_detr.analysis.subject import Progress, Sample, Subject

_MEANING = {
    "Cls": "right place, wrong class",
    "Loc": "right class, box too loose",
    "Both": "wrong class and loose box",
    "Dupe": "a better detection has the object already",
    "Bkg": "nothing is there",
    "Miss": "object that no other error accounts for",
    "FP": "all false positives together",
    "FN": "all objects without a correct detection",
}

_TEXT = f"""Every detection that is not correct at IoU {FOREGROUND_IOU} has one reason, and so has \
every object that nothing was found for. The weight of a kind of error is the gain in AP at IoU \
{FOREGROUND_IOU}, in points, if all errors of that kind alone were mended: a wrong class or box \
put right, a duplicate or a detection on the background removed, a missed object taken out of the \
ground truth. The kinds overlap in what they cost, so the gains do not add up to what is missing.

A box is loose between IoU {BACKGROUND_IOU} and {FOREGROUND_IOU}. The best {MAX_DETECTIONS} \
detections of each image count; crowd regions are not known here, and detections in them count as \
false positives. With few images a gain of a point or two is no difference.

Source: TIDE (Bolya et al., ECCV 2020)."""


def measure_errors(
    subjects: Sequence[Subject], samples: Sequence[Sample], progress: Progress
) -> Section:
    """TIDE's error analysis of each model's detections."""
    weights = {each.name: weigh_errors(judge(each, samples, progress)) for each in subjects}
    measured = {name: w for name, w in weights.items() if w.average_precision is not None}
    if not measured:
        text = "The images have no ground truth, so that nothing can be judged."
        return Section("errors", "Kinds of errors", text, {})
    return Section(
        key="errors",
        title="Kinds of errors",
        text=_TEXT,
        numbers={
            name: {
                "AP50": each.average_precision,
                "gain_in_AP50": each.gains,
                "number_of_errors": each.counts,
            }
            for name, each in measured.items()
        },
        tables=_tables(measured),
        charts=(
            Chart(
                "gains",
                f"Gain in AP at IoU {FOREGROUND_IOU} if all errors of one kind were mended.",
                _bars(measured),
            ),
        ),
    )


def judge(subject: Subject, samples: Sequence[Sample], progress: Progress) -> Judgement:
    """Judges all detections of a model, in the pixels of the network input."""
    number = subject.model.num_classes
    judged = []
    for sample in progress(samples):
        with torch.no_grad():
            # Without the size of the file, detections stay in the resolution of the input.
            output = subject.model([{"image": sample.input["image"]}])[0]["instances"]
        judged.append(judge_image(image_result(output, sample.input["instances"]), number))
    return Judgement.joined(judged)


def image_result(found: Instances, truth: Instances) -> ImageResult:
    """Detections and ground truth as arrays on the CPU."""
    return ImageResult(
        boxes=found.pred_boxes.tensor.cpu().numpy().astype(np.float64),
        scores=found.scores.cpu().numpy().astype(np.float64),
        classes=found.pred_classes.cpu().numpy(),
        truth_boxes=truth.gt_boxes.tensor.cpu().numpy().astype(np.float64),
        truth_classes=truth.gt_classes.cpu().numpy(),
    )


def _tables(measured: dict[str, ErrorWeights]) -> tuple[Table, Table]:
    names = tuple(measured)
    gains = Table(
        "gains",
        f"AP at IoU {FOREGROUND_IOU} and the gain from mending each kind of error, in points.",
        ("error", "meaning", *names),
        (
            ("AP50", "as it is", *(measured[name].average_precision for name in names)),
            *(
                (kind, meaning, *(measured[name].gains[kind] for name in names))
                for kind, meaning in _MEANING.items()
            ),
        ),
    )
    counts = Table(
        "counts",
        "Number of errors, whatever their scores. Most false positives have low scores and cost "
        "little.",
        ("error", *names),
        tuple((kind, *(measured[name].counts[kind] for name in names)) for kind in _MEANING),
    )
    return gains, counts


def _bars(measured: dict[str, ErrorWeights]) -> Figure:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(measured)
    positions = np.arange(len(_MEANING))
    for index, (name, each) in enumerate(measured.items()):
        offset = (index - (len(measured) - 1) / 2) * width
        heights = [each.gains[kind] for kind in _MEANING]
        bars = axes.bar(positions + offset, heights, width, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.axvline(len(_MEANING) - 2.5, color="0.7", linewidth=0.8)
    axes.set_xticks(positions, list(_MEANING))
    axes.set_ylabel("gain in AP50 (points)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    return figure
