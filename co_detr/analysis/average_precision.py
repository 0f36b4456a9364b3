"""Average precision of detections that are known to be correct or not."""

from __future__ import annotations

import numpy as np

# Not linspace, whose numbers are not those of the fractions: 7 of 100 objects have to reach 0.07.
_RECALLS = np.arange(101) / 100


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
