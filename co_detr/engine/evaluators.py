"""COCO's and LVIS's judgment of boxes and masks.

Both are computed by the package faster-coco-eval, which gives the numbers of pycocotools and of
lvis in a fraction of the time. Environments from before it was required have pycocotools alone.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from detectron2.utils.logger import create_small_table
from tabulate import tabulate

from co_detr.data.coco_file import Entry
from co_detr.engine.evaluation import BOXES, MASKS, DetectionEvaluator
from co_detr.errors import ConfigError
from co_detr.files import written_whole
from co_detr.moved import renamed_member

try:
    from faster_coco_eval import COCO, COCOeval_faster
except ImportError:
    from pycocotools.coco import COCO

    COCOeval_faster = None

logger = logging.getLogger(__name__)

COCO_LIMIT = 100  # detections per image and class that COCO's AP looks at
CLASS_FILES = {BOXES: "per_class_ap.csv", MASKS: "per_class_segm_ap.csv"}
_CLASS_COLUMNS = ("class", "AP", "AP50", "ground_truths")
_JUDGED = {BOXES: "boxes", MASKS: "masks"}
_SIZES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_FREQUENCIES = {"APr": "r", "APc": "c", "APf": "f"}  # LVIS: rare, common, frequent
MOST_PAIRS = 1_000_000  # of an image and a class, evaluated at a time: about 1 GiB
_OF_IMAGES = ("neg_category_ids", "not_exhaustive_category_ids")  # LVIS: categories of an image


class CocoDetectionEvaluator(DetectionEvaluator):
    """The evaluation of the COCO API.

    Writes `coco_instances_results.json` and `per_class_ap.csv` to `output_dir`, for masks also
    `per_class_segm_ap.csv`. The file may have fewer classes than the model (`align_classes`):
    detections of others are left out.

    Args:
        max_detections: best detections of each image and class that count; 100 is COCO's own limit,
            with which numbers can be compared with those of others. Images with more objects need
            more.
    """

    results_name = "coco_instances_results.json"

    def __init__(
        self,
        annotation_file: str,
        output_dir: str | None = None,
        max_detections: int = COCO_LIMIT,
    ) -> None:
        super().__init__(annotation_file, output_dir, max_detections)

    def judge(self, detections: list[Entry], iou_type: str = BOXES) -> dict[str, float]:
        dataset = self.ground_truth(iou_type)
        numbered = NumberedDataset(dataset)
        evaluation = self._accumulated(numbered, numbered.load(detections), iou_type)
        metrics = {
            name: _percent(value) for name, value in zip(_SIZES, evaluation.stats, strict=False)
        }
        judged = _JUDGED[iou_type]
        self.log_table(f"Evaluation results for {judged}", create_small_table(metrics))
        classes = class_results(
            evaluation,
            dataset["annotations"],
            list(numbered.categories),
            self.metadata.thing_dataset_id_to_contiguous_id,
            self.metadata.thing_classes,
        )
        of_masks = f" ({judged})" if iou_type == MASKS else ""
        self.log_table(f"Results by class{of_masks}", format_classes(classes))
        if self.output_dir:
            write_classes(classes, os.path.join(self.output_dir, CLASS_FILES[iou_type]))
        return metrics | {f"AP-{result.name}": result.ap for result in classes}

    def _accumulated(self, numbered: NumberedDataset, found: COCO, iou_type: str) -> Any:
        limit = self.max_detections
        if limit != COCO_LIMIT:
            logger.info("Up to %d detections of each class count in an image.", limit)
        # In rising order, as the last one is the limit of AP.
        limits = [min(1, limit), min(10, limit), limit]
        if COCOeval_faster is not None:
            evaluation = evaluated(numbered, found, limits, iou_type)
        else:
            logger.info("pycocotools evaluates; pip install faster-coco-eval takes less time.")
            # Its own summary knows COCO's limit only.
            evaluation = COCOevalMaxDets(numbered.coco, found, iou_type)
            evaluation.params.maxDets = limits
            evaluation.evaluate()
            evaluation.accumulate()
        evaluation.summarize()
        return evaluation


class LvisDetectionEvaluator(DetectionEvaluator):
    """LVIS's own evaluation on a file that `load_lvis` has read.

    Reports AP, AP50, AP75, by size (APs, APm, APl) and by frequency of the class in the training
    set (APr, APc, APf: rare, common, frequent). A class counts only in images that were searched
    for it. Writes `lvis_instances_results.json` to `output_dir`.

    Args:
        max_detections: best detections of each image that count; 300 is LVIS's own limit.

    Raises:
        ConfigError: if `faster-coco-eval` is not installed.
    """

    results_name = "lvis_instances_results.json"

    def __init__(
        self, annotation_file: str, output_dir: str | None = None, max_detections: int = 300
    ) -> None:
        if COCOeval_faster is None:
            raise ConfigError(
                "evaluation on LVIS needs the package faster-coco-eval, which cannot be imported "
                "here: run pip install faster-coco-eval."
            )
        super().__init__(annotation_file, output_dir, max_detections)

    def judge(self, detections: list[Entry], iou_type: str = BOXES) -> dict[str, float]:
        if not detections:
            logger.warning("The model has not detected anything.")
            return dict.fromkeys((*_SIZES, *_FREQUENCIES), math.nan)
        logger.info("Up to %d detections count in an image.", self.max_detections)
        dataset = self.ground_truth(iou_type)
        numbered = NumberedDataset(dataset)
        found = numbered.load(best_of_each_image(detections, self.max_detections))
        evaluation = evaluated(numbered, found, [self.max_detections], iou_type, lvis_style=True)
        evaluation.summarize()
        metrics = {
            name: _percent(value) for name, value in zip(_SIZES, evaluation.stats, strict=False)
        }
        # (thresholds, recalls, classes) over all sizes
        precisions = evaluation.eval["precision"][:, :, :, 0, 0]
        frequencies = {
            category["id"]: category.get("frequency") for category in dataset["categories"]
        }
        for name, frequency in _FREQUENCIES.items():
            those = [frequencies[key] == frequency for key in numbered.categories]
            metrics[name] = _mean(precisions[:, :, those])
        title = f"Evaluation results for {_JUDGED[iou_type]}"
        self.log_table(title, create_small_table(metrics))
        return metrics


class NumberedDataset:
    """A data set whose images and categories are numbered from 1 on, in the order of their ids.

    faster-coco-eval takes whole numbers only, where files may have text.

    Attributes:
        coco: the COCO API's object.
        images, categories: id in the file -> number.
    """

    def __init__(self, dataset: Mapping[str, list[Entry]]) -> None:
        self.images = _numbers(image["id"] for image in dataset["images"])
        self.categories = _numbers(category["id"] for category in dataset["categories"])
        self._lists = {
            "info": {},
            "images": [self._image(image) for image in dataset["images"]],
            "annotations": list(map(self._annotation, dataset["annotations"])),
            "categories": [
                category | {"id": self.categories[category["id"]]}
                for category in dataset["categories"]
            ],
        }
        self.coco = _indexed(self._lists)

    def load(self, detections: Iterable[Entry]) -> COCO:
        """Detections with the file's ids, for the COCO API."""
        numbered = list(map(self._annotation, detections))
        with contextlib.redirect_stdout(io.StringIO()):
            # The API wants at least one.
            return (
                self.coco.loadRes(numbered)
                if numbered
                else _indexed(self._lists | {"annotations": []})
            )

    def _annotation(self, entry: Entry) -> Entry:
        image, category = self.images[entry["image_id"]], self.categories[entry["category_id"]]
        return entry | {"image_id": image, "category_id": category}

    def _image(self, entry: Entry) -> Entry:
        lists = {
            key: [
                self.categories[category] for category in entry[key] if category in self.categories
            ]
            for key in _OF_IMAGES
            if key in entry
        }
        return entry | {"id": self.images[entry["id"]]} | lists


def evaluated(
    numbered: NumberedDataset,
    found: COCO,
    limits: list[int],
    iou_type: str,
    lvis_style: bool = False,
) -> Any:
    """An accumulated `COCOeval_faster`, ready for its summary.

    Classes do not depend on each other: some are evaluated at a time, as the memory grows with the
    number of images times that of classes.
    """

    def of(categories: list[int], **settings: Any) -> Any:
        evaluation = COCOeval_faster(numbered.coco, found, iou_type, **settings)
        evaluation.params.catIds = categories
        evaluation.params.maxDets = limits
        return evaluation

    categories = sorted(numbered.categories.values())
    at_a_time = max(1, MOST_PAIRS // max(1, len(numbered.images)))
    parts = []
    for start in range(0, max(1, len(categories)), at_a_time):
        part = of(categories[start : start + at_a_time], lvis_style=lvis_style)
        part.evaluate()
        part.accumulate()
        parts.append(part.eval)
    whole = of(categories, print_function=print)
    whole.eval = {
        # (thresholds, recalls, classes, sizes, limits); recall has no second axis
        name: np.concatenate([part[name] for part in parts], axis)
        for name, axis in (("precision", 2), ("recall", 1))
    }
    return whole


def best_of_each_image(detections: Iterable[Entry], number: int) -> list[Entry]:
    """The detections with the highest scores; of equal scores those that come first."""
    by_image: dict[int | str, list[Entry]] = defaultdict(list)
    for detection in detections:
        by_image[detection["image_id"]].append(detection)
    return [
        best
        for found in by_image.values()
        for best in sorted(found, key=lambda entry: entry["score"], reverse=True)[:number]
    ]


def _numbers(ids: Iterable[Any]) -> dict[Any, int]:
    return {key: number for number, key in enumerate(sorted(ids), start=1)}


def _indexed(dataset: dict[str, Any]) -> COCO:
    """The COCO API on a data set in memory, where its own constructor wants a file."""
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools says "creating index..."
        coco.createIndex()
    return coco


def _percent(value: float) -> float:
    """-1 stands for undefined."""
    return 100 * float(value) if value >= 0 else math.nan


@dataclass(frozen=True)
class ClassResult:
    """Numbers of one class.

    Attributes:
        name: of the class.
        ap, ap50: from 0 to 100; NaN without ground truth.
        ground_truths: objects that could be found (crowd regions are not).
    """

    name: str
    ap: float
    ap50: float
    ground_truths: int


def class_results(
    evaluation: Any,
    annotations: Sequence[Entry],
    categories: Sequence[int | str],
    order: Mapping[int | str, int],
    names: Sequence[str],
) -> list[ClassResult]:
    """What an accumulated `COCOeval` found.

    Args:
        evaluation: of boxes or masks, with its precisions.
        annotations: the ground truth.
        categories: ids of the file, in the order of the evaluation's.
        order: category id of the file -> position of the class, which the result is sorted by.
        names: of the classes, by their position.
    """
    # (thresholds, recalls, classes) over all sizes, with the largest number of detections
    precisions = evaluation.eval["precision"][:, :, :, 0, -1]
    at_50 = int(np.flatnonzero(np.isclose(evaluation.params.iouThrs, 0.5))[0])
    boxes = Counter(
        annotation["category_id"] for annotation in annotations if not annotation["iscrowd"]
    )
    results = {
        category: ClassResult(
            names[order[category]],
            _mean(precisions[:, :, index]),
            _mean(precisions[at_50, :, index]),
            boxes[category],
        )
        for index, category in enumerate(categories)
    }
    return [results[category] for category in sorted(results, key=order.__getitem__)]


def format_classes(results: Sequence[ClassResult]) -> str:
    """A table with one line per class."""
    rows = [
        (result.name, _text(result.ap, ".1f"), _text(result.ap50, ".1f"), result.ground_truths)
        for result in results
    ]
    align = ("left", "right", "right", "right")
    return tabulate(rows, _CLASS_COLUMNS, tablefmt="github", colalign=align, disable_numparse=True)


def write_classes(results: Sequence[ClassResult], path: str) -> None:
    """Writes a csv file, where undefined numbers are empty."""
    with written_whole(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_CLASS_COLUMNS)
        for result in results:
            numbers = (_text(result.ap, ".3f"), _text(result.ap50, ".3f"), result.ground_truths)
            writer.writerow((result.name, *numbers))


def _mean(precisions: np.ndarray) -> float:
    defined = precisions[precisions > -1]
    return 100 * float(np.mean(defined)) if defined.size else math.nan


def _text(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def __getattr__(name: str) -> Any:
    """Evaluators by the names that they had in an earlier version, for configs in Python."""
    return renamed_member(__name__, globals(), name)
