"""AP of every class: a table for the log, and a file."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from tabulate import tabulate

from co_detr.files import written_whole

FILE_NAME = "per_class_ap.csv"
_HEADERS = ("class", "AP", "AP50", "ground_truths")


@dataclass(frozen=True)
class ClassResult:
    """Numbers of one class.

    Attributes:
        name: of the class.
        ap, ap50: from 0 to 100; NaN without ground truth.
        ground_truths: boxes that could be found (crowd regions are not).
    """

    name: str
    ap: float
    ap50: float
    ground_truths: int


def class_results(
    coco_eval: Any, coco: COCO, order: Mapping[int | str, int], names: Sequence[str]
) -> list[ClassResult]:
    """What an accumulated `COCOeval` found.

    Args:
        coco_eval: of boxes, with its precisions.
        coco: the ground truth.
        order: category id of the file -> position of the class, which the result is sorted by.
        names: of the classes, by their position.
    """
    parameters = coco_eval.params
    # (thresholds, recalls, classes) over all sizes, with the largest number of detections
    precisions = coco_eval.eval["precision"][:, :, :, 0, -1]
    at_50 = int(np.flatnonzero(np.isclose(parameters.iouThrs, 0.5))[0])
    results = {}
    for index, category in enumerate(parameters.catIds):
        boxes = coco.getAnnIds(parameters.imgIds, [category], iscrowd=False)
        results[category] = ClassResult(
            names[order[category]],
            _mean(precisions[:, :, index]),
            _mean(precisions[at_50, :, index]),
            len(boxes),
        )
    return [results[category] for category in sorted(results, key=order.__getitem__)]


def format_classes(results: Sequence[ClassResult]) -> str:
    """A table with one line per class."""
    rows = [
        (each.name, _text(each.ap, ".1f"), _text(each.ap50, ".1f"), each.ground_truths)
        for each in results
    ]
    align = ("left", "right", "right", "right")
    return tabulate(rows, _HEADERS, tablefmt="github", colalign=align, disable_numparse=True)


def write_classes(results: Sequence[ClassResult], folder: str) -> str:
    """Writes `per_class_ap.csv`, where undefined numbers are empty; returns its path."""
    path = os.path.join(folder, FILE_NAME)
    with written_whole(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_HEADERS)
        for each in results:
            numbers = (_text(each.ap, ".3f"), _text(each.ap50, ".3f"), each.ground_truths)
            writer.writerow((each.name, *numbers))
    return path


def _mean(precisions: np.ndarray) -> float:
    defined = precisions[precisions > -1]
    return 100 * float(np.mean(defined)) if defined.size else math.nan


def _text(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)
