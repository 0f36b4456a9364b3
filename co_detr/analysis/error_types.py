"""Every false positive and every missed object has one reason.

Source: TIDE (Bolya et al., ECCV 2020, section 2.2), with the order of its tests and the handling of
detections that compete for one object as in the authors' program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from co_detr.analysis.average_precision import mean_average_precision

FOREGROUND_IOU = 0.5
BACKGROUND_IOU = 0.1
MAX_DETECTIONS = 100


class Verdict(IntEnum):
    """What a detection is."""

    CORRECT = 0
    CLASS = 1
    LOCATION = 2
    BOTH = 3
    DUPLICATE = 4
    BACKGROUND = 5


@dataclass(frozen=True)
class ImageResult:
    """Detections and ground truth of one image; boxes `(N, 4)` absolute xyxy, float64."""

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    truth_boxes: np.ndarray
    truth_classes: np.ndarray


@dataclass(frozen=True)
class Judgement:
    """N detections and K classes of any number of images.

    Attributes:
        scores, classes, verdicts: ``(N,)``, a `Verdict` each.
        mended_classes: ``(N,)``, class of which the detection is correct once its error is mended;
            -1 where mending removes it.
        truths, unmatched, missed: ``(K,)`` ground truths of each class, those that no detection
            is correct for, and of these the ones that no mended detection would be correct for.
    """

    scores: np.ndarray
    classes: np.ndarray
    verdicts: np.ndarray
    mended_classes: np.ndarray
    truths: np.ndarray
    unmatched: np.ndarray
    missed: np.ndarray

    @classmethod
    def joined(cls, images: Sequence[Judgement]) -> Judgement:
        """Of several images."""
        per_detection = ("scores", "classes", "verdicts", "mended_classes")
        per_class = ("truths", "unmatched", "missed")
        return cls(
            **{name: np.concatenate([getattr(i, name) for i in images]) for name in per_detection},
            **{name: np.sum([getattr(i, name) for i in images], axis=0) for name in per_class},
        )


def judge_image(image: ImageResult, num_classes: int) -> Judgement:
    """Judges the `MAX_DETECTIONS` best detections of an image.

    1. From the best to the worst, a detection is correct if an unmatched ground truth of its class
       overlaps it by `FOREGROUND_IOU`; it takes the one with the largest IoU.
    2. Of the others: LOCATION, if the largest IoU with its class lies between the two thresholds;
       CLASS, if it overlaps another class by `FOREGROUND_IOU`; DUPLICATE, if a matched ground
       truth of its class; BACKGROUND, if nothing by more than `BACKGROUND_IOU`; else BOTH.
    3. A LOCATION or CLASS error is mended into a correct detection of its ground truth if that is
       unmatched; of several for one, the best detection is, and the others are removed.
    4. Unmatched ground truths that nothing would be mended into are missed.
    """
    order = np.argsort(-image.scores, kind="stable")[:MAX_DETECTIONS]
    boxes, scores, classes = image.boxes[order], image.scores[order], image.classes[order]
    overlaps = pairwise_iou(boxes, image.truth_boxes)  # (N, G)
    same_class = classes[:, None] == image.truth_classes[None]
    matched = _match(np.where(same_class, overlaps, 0.0))
    taken = np.isin(np.arange(len(image.truth_classes)), matched)

    verdicts = np.full(len(order), Verdict.CORRECT, dtype=np.int64)
    mended = np.where(matched >= 0, classes, -1)
    wanted = np.zeros_like(taken)  # ground truths that a mended detection is correct for
    for index in np.flatnonzero(matched < 0):
        verdict, truth = _explain(overlaps[index], same_class[index], taken)
        verdicts[index] = verdict
        if truth is not None and not taken[truth] and not wanted[truth]:
            wanted[truth] = True
            mended[index] = image.truth_classes[truth]

    def per_class(chosen: np.ndarray) -> np.ndarray:
        return np.bincount(image.truth_classes[chosen], minlength=num_classes)

    return Judgement(
        scores,
        classes,
        verdicts,
        mended,
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
        gains: points of AP that mending all errors of a kind alone would give, by name.
        counts: number of errors by name.
    """

    average_precision: float | None
    gains: dict[str, float]
    counts: dict[str, int]


ERROR_NAMES = {
    Verdict.CLASS: "Cls",
    Verdict.LOCATION: "Loc",
    Verdict.BOTH: "Both",
    Verdict.DUPLICATE: "Dupe",
    Verdict.BACKGROUND: "Bkg",
}
MISSED, FALSE_POSITIVE, FALSE_NEGATIVE = "Miss", "FP", "FN"


def weigh_errors(judged: Judgement) -> ErrorWeights:
    """The gain in AP at IoU 0.5 from mending each kind of error by itself.

    A missed object is mended by taking it out of the ground truth. FP mends all false positives
    (they go behind all correct detections), FN all unmatched objects.
    """
    correct = judged.verdicts == Verdict.CORRECT
    base = mean_average_precision(judged.scores, judged.classes, correct, judged.truths)
    if base is None:
        return ErrorWeights(None, {}, {})

    def gain(scores, classes, kept, correct, truths) -> float:
        mended = mean_average_precision(scores[kept], classes[kept], correct[kept], truths)
        # Without any object left to find, nothing is wrong any more.
        return max(0.0, (100.0 if mended is None else mended) - base)

    everything = np.ones_like(correct)
    gains, counts = {}, {}
    for verdict, name in ERROR_NAMES.items():
        chosen = judged.verdicts == verdict
        classes = np.where(chosen, judged.mended_classes, judged.classes)
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
