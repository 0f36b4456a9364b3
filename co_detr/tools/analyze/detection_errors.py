"""What keeps a model from a perfect AP at IoU 0.5: every error has one kind.

Source: TIDE (Bolya et al., ECCV 2020, section 2.2), with the order of its tests and the handling of
detections that compete for one object as in the authors' program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from detectron2.structures import Instances
from matplotlib.figure import Figure

from co_detr.tools.analyze.report import Chart, Section, Table
from co_detr.tools.analyze.subjects import Progress, Sample, Subject

FOREGROUND_IOU = 0.5
BACKGROUND_IOU = 0.1
MAX_DETECTIONS = 100
MISSED, FALSE_POSITIVE, FALSE_NEGATIVE = "Miss", "FP", "FN"

# Not linspace, whose numbers are not those of the fractions: 7 of 100 objects have to reach 0.07.
_RECALLS = np.arange(101) / 100

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
{FOREGROUND_IOU}, in points, if all errors of that kind alone were fixed: a wrong class or box \
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
    weights = {
        subject.name: weigh_errors(judge(subject, samples, progress)) for subject in subjects
    }
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
                "AP50": weights.average_precision,
                "gain_in_AP50": weights.gains,
                "number_of_errors": weights.counts,
            }
            for name, weights in measured.items()
        },
        tables=_tables(measured),
        charts=(
            Chart(
                "gains",
                f"Gain in AP at IoU {FOREGROUND_IOU} if all errors of one kind were fixed.",
                _bars(measured),
            ),
        ),
    )


def judge(subject: Subject, samples: Sequence[Sample], progress: Progress) -> Judgment:
    """Judges all detections of a model, in the pixels of the network input."""
    number = subject.model.num_classes
    judged = []
    for sample in progress(samples):
        with torch.no_grad():
            # Without the size of the file, detections stay in the resolution of the input.
            output = subject.model([{"image": sample.input["image"]}])[0]["instances"]
        judged.append(judge_image(image_result(output, sample.input["instances"]), number))
    return Judgment.joined(judged)


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
        f"AP at IoU {FOREGROUND_IOU} and the gain from fixing each kind of error, in points.",
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
    for index, (name, weights) in enumerate(measured.items()):
        offset = (index - (len(measured) - 1) / 2) * width
        heights = [weights.gains[kind] for kind in _MEANING]
        bars = axes.bar(positions + offset, heights, width, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.axvline(len(_MEANING) - 2.5, color="0.7", linewidth=0.8)
    axes.set_xticks(positions, list(_MEANING))
    axes.set_ylabel("gain in AP50 (points)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    return figure


class Verdict(IntEnum):
    """What a detection is."""

    CORRECT = 0
    CLASS = 1
    LOCATION = 2
    BOTH = 3
    DUPLICATE = 4
    BACKGROUND = 5


ERROR_NAMES = {
    Verdict.CLASS: "Cls",
    Verdict.LOCATION: "Loc",
    Verdict.BOTH: "Both",
    Verdict.DUPLICATE: "Dupe",
    Verdict.BACKGROUND: "Bkg",
}


@dataclass(frozen=True)
class ImageResult:
    """Detections and ground truth of one image; boxes `(N, 4)` absolute xyxy, float64."""

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    truth_boxes: np.ndarray
    truth_classes: np.ndarray


@dataclass(frozen=True)
class Judgment:
    """N detections and K classes of any number of images.

    Attributes:
        scores, classes, verdicts: ``(N,)``, a `Verdict` each.
        fixed_classes: ``(N,)``, class of which the detection is correct once its error is fixed;
            -1 where fixing removes it.
        truths, unmatched, missed: ``(K,)`` ground truths of each class, those that no detection
            is correct for, and of these the ones that no fixed detection would be correct for.
    """

    scores: np.ndarray
    classes: np.ndarray
    verdicts: np.ndarray
    fixed_classes: np.ndarray
    truths: np.ndarray
    unmatched: np.ndarray
    missed: np.ndarray

    @classmethod
    def joined(cls, images: Sequence[Judgment]) -> Judgment:
        """Of several images."""
        per_detection = ("scores", "classes", "verdicts", "fixed_classes")
        per_class = ("truths", "unmatched", "missed")
        return cls(
            **{name: np.concatenate([getattr(i, name) for i in images]) for name in per_detection},
            **{name: np.sum([getattr(i, name) for i in images], axis=0) for name in per_class},
        )


def judge_image(image: ImageResult, num_classes: int) -> Judgment:
    """Judges the `MAX_DETECTIONS` best detections of an image.

    1. From the best to the worst, a detection is correct if an unmatched ground truth of its class
       overlaps it by `FOREGROUND_IOU`; it takes the one with the largest IoU.
    2. Of the others: LOCATION, if the largest IoU with its class lies between the two thresholds;
       CLASS, if it overlaps another class by `FOREGROUND_IOU`; DUPLICATE, if a matched ground
       truth of its class; BACKGROUND, if nothing by more than `BACKGROUND_IOU`; else BOTH.
    3. A LOCATION or CLASS error is fixed by making it a correct detection of its ground truth if
       that is unmatched; of several for one, the best detection is, and the others are removed.
    4. Unmatched ground truths that no fixed error would detect are missed.
    """
    order = np.argsort(-image.scores, kind="stable")[:MAX_DETECTIONS]
    boxes, scores, classes = image.boxes[order], image.scores[order], image.classes[order]
    overlaps = pairwise_iou(boxes, image.truth_boxes)  # (N, G)
    same_class = classes[:, None] == image.truth_classes[None]
    matched = _match(np.where(same_class, overlaps, 0.0))
    taken = np.isin(np.arange(len(image.truth_classes)), matched)

    verdicts = np.full(len(order), Verdict.CORRECT, dtype=np.int64)
    fixed = np.where(matched >= 0, classes, -1)
    wanted = np.zeros_like(taken)  # ground truths that a fixed detection is correct for
    for index in np.flatnonzero(matched < 0):
        verdict, truth = _explain(overlaps[index], same_class[index], taken)
        verdicts[index] = verdict
        if truth is not None and not taken[truth] and not wanted[truth]:
            wanted[truth] = True
            fixed[index] = image.truth_classes[truth]

    def per_class(chosen: np.ndarray) -> np.ndarray:
        return np.bincount(image.truth_classes[chosen], minlength=num_classes)

    return Judgment(
        scores,
        classes,
        verdicts,
        fixed,
        truths=per_class(np.ones_like(taken)),
        unmatched=per_class(~taken),
        missed=per_class(~taken & ~wanted),
    )


def _match(overlaps: np.ndarray) -> np.ndarray:
    """``(N, G)`` IoU, 0 for other classes -> ``(N,)`` index of the ground truth, -1 for none."""
    matched = np.full(len(overlaps), -1)
    free = overlaps.copy()
    for index, row in enumerate(free):
        if row.size and row.max() >= FOREGROUND_IOU:
            matched[index] = row.argmax()
            free[:, matched[index]] = 0.0
    return matched


def _explain(
    overlaps: np.ndarray, same_class: np.ndarray, taken: np.ndarray
) -> tuple[Verdict, int | None]:
    """Reason of a false positive, and the ground truth that it meant; all arguments ``(G,)``."""
    if not overlaps.size:
        return Verdict.BACKGROUND, None
    own, other = np.where(same_class, overlaps, 0.0), np.where(same_class, 0.0, overlaps)
    if BACKGROUND_IOU <= own.max() <= FOREGROUND_IOU:
        return Verdict.LOCATION, int(own.argmax())
    if other.max() >= FOREGROUND_IOU:
        return Verdict.CLASS, int(other.argmax())
    if np.where(taken, own, 0.0).max() >= FOREGROUND_IOU:
        return Verdict.DUPLICATE, None
    if overlaps.max() <= BACKGROUND_IOU:
        return Verdict.BACKGROUND, None
    return Verdict.BOTH, None


def pairwise_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """``(N, 4), (M, 4)`` absolute xyxy -> ``(N, M)``; 0 for boxes without area."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = (high - low).clip(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(-1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


@dataclass(frozen=True)
class ErrorWeights:
    """What the errors cost.

    Attributes:
        average_precision: at IoU 0.5, in percent; None without any ground truth.
        gains: points of AP that fixing all errors of a kind alone would give, by name.
        counts: number of errors by name.
    """

    average_precision: float | None
    gains: dict[str, float]
    counts: dict[str, int]


def weigh_errors(judged: Judgment) -> ErrorWeights:
    """The gain in AP at IoU 0.5 from fixing each kind of error by itself.

    A missed object is fixed by taking it out of the ground truth. FP fixes all false positives
    (they go behind all correct detections), FN all unmatched objects.
    """
    correct = judged.verdicts == Verdict.CORRECT
    base = mean_average_precision(judged.scores, judged.classes, correct, judged.truths)
    if base is None:
        return ErrorWeights(None, {}, {})

    def gain(scores, classes, kept, correct, truths) -> float:
        fixed = mean_average_precision(scores[kept], classes[kept], correct[kept], truths)
        # Without any object left to find, nothing is wrong any more.
        return max(0.0, (100.0 if fixed is None else fixed) - base)

    everything = np.ones_like(correct)
    gains, counts = {}, {}
    for verdict, name in ERROR_NAMES.items():
        chosen = judged.verdicts == verdict
        classes = np.where(chosen, judged.fixed_classes, judged.classes)
        gains[name] = gain(judged.scores, classes, classes >= 0, correct | chosen, judged.truths)
        counts[name] = int(chosen.sum())
    for name, lost in ((MISSED, judged.missed), (FALSE_NEGATIVE, judged.unmatched)):
        truths = judged.truths - lost
        gains[name] = gain(judged.scores, judged.classes, everything, correct, truths)
        counts[name] = int(lost.sum())
    ranks = correct.astype(np.float64)
    gains[FALSE_POSITIVE] = gain(ranks, judged.classes, everything, correct, judged.truths)
    counts[FALSE_POSITIVE] = int((~correct).sum())
    return ErrorWeights(base, gains, counts)


def average_precision(scores: np.ndarray, correct: np.ndarray, num_truths: int) -> float:
    """Of one class, in percent: COCO's mean of the precision at 101 recalls.

    Args:
        scores: ``(N,)``, in any order; of equal ones the earlier counts first.
        correct: ``(N,)`` bool.
        num_truths: objects of the class, at least 1.
    """
    hits = correct[np.argsort(-scores, kind="stable")].cumsum()
    precision = hits / np.arange(1, len(hits) + 1)
    # The best precision at this recall or a higher one.
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    first = np.searchsorted(hits / num_truths, _RECALLS, side="left")
    return 100.0 * float(np.append(precision, 0.0)[first].mean())


def mean_average_precision(
    scores: np.ndarray, classes: np.ndarray, correct: np.ndarray, truths: np.ndarray
) -> float | None:
    """Mean over the classes that have ground truth; None if there is no such class.

    Args:
        scores, classes, correct: ``(N,)`` of all detections.
        truths: ``(K,)`` objects of each class.
    """
    values = [
        average_precision(scores[classes == label], correct[classes == label], truths[label])
        for label in np.flatnonzero(truths)
    ]
    return float(np.mean(values)) if values else None
