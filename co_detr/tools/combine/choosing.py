"""Settings are chosen, and results judged, by ground truth.

AP is that of the evaluator of trainings. Choosing and judging on the same images flatters: a
`Judge` keeps apart the images to choose by and those to report.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pycocotools.mask as mask_utils
from tabulate import tabulate
from tqdm import tqdm

from co_detr.data.coco_classes import register_classes
from co_detr.data.coco_file import CocoFile, Entry, is_number, read_json, shortened
from co_detr.data.preflight_annotations import PreflightReport, SplitReport, check_annotations
from co_detr.data.preflight_boxes import check_boxes
from co_detr.engine.evaluation import BOXES, MASKS, DetectionEvaluator, as_masks, missing_masks
from co_detr.engine.evaluators import CocoDetectionEvaluator
from co_detr.errors import ConfigError, DataError
from co_detr.tools.combine import RULES
from co_detr.tools.combine.fusing import Settings, combined
from co_detr.tools.results import DetectionFile, ImageId, Reference, by_image

SWEPT_IOUS = (0.45, 0.55, 0.65, 0.75)
_MATCH_IOU = 0.5  # from which on a detection is right, for thresholds and temperatures
_TEMPERATURES = np.geomspace(0.25, 4, 65)
_SHOWN = 12  # lines of the table of a sweep


class Judge:
    """Metrics by the evaluator of trainings, on the images to choose by and on those to report.

    Args:
        tune: images that settings are chosen on; None: all of them are for both.
        max_detections: of each image and class that AP looks at.

    Raises:
        DataError: if the ground truth has an error that the preflight of a training reports.
    """

    def __init__(
        self,
        truth: CocoFile,
        reference: Reference,
        tune: frozenset[ImageId] | None,
        max_detections: int,
    ) -> None:
        checked = SplitReport("val", truth.path, suspicion="warning")
        images, annotations = check_annotations(checked, truth, unlabeled=True)
        check_boxes(checked, annotations or [], images, "skip")
        PreflightReport([checked]).raise_on_errors()
        every = frozenset(reference.images)
        self.reference = reference
        self.tune = every if tune is None else tune
        self.report = every if tune is None else every - tune
        register_classes(truth.path)
        self._whole = CocoDetectionEvaluator(truth.path, None, max_detections)
        self._parts: dict[frozenset[ImageId], DetectionEvaluator] = {every: self._whole}
        self.is_labeled = self._whole.labeled

    @property
    def is_honest(self) -> bool:
        """Whether no image that is reported on was used to choose."""
        return not self.tune & self.report

    def metrics(self, entries: Sequence[Entry], images: frozenset[ImageId]) -> dict[str, float]:
        """AP and so on; of masks ``segm/AP`` and so on, where both sides have them."""
        evaluator = self._of(images)
        chosen = [entry for entry in entries if entry["image_id"] in images]
        with contextlib.redirect_stdout(io.StringIO()):  # the COCO API prints
            found = evaluator.judge(chosen)
            if chosen and all("segmentation" in entry for entry in chosen):
                masked = evaluator.ground_truth(MASKS)
                if missing_masks(self.reference.path, masked) is None:
                    masks = evaluator.judge(as_masks(chosen), MASKS)
                    found |= {f"{MASKS}/{name}": value for name, value in masks.items()}
        return found

    def objects(self, images: frozenset[ImageId]) -> Mapping[ImageId, list[Entry]]:
        """Ground truth of each image."""
        return by_image(self._of(images).ground_truth(BOXES)["annotations"])

    def _of(self, images: frozenset[ImageId]) -> DetectionEvaluator:
        if images not in self._parts:
            self._parts[images] = self._whole.on_images(images)
        return self._parts[images]


def sweep(sources: Sequence[DetectionFile], settings: Settings, judge: Judge) -> Settings:
    """The best of rules, IoUs and weights by AP on the images to choose by; prints a table.

    Weights: all alike, and each file in turn with twice that of the others.
    """
    alike = (1.0,) * len(sources)
    weights = [alike, *(alike[:n] + (2.0,) + alike[n + 1 :] for n in range(len(sources)))]
    candidates = [
        replace(settings, rule=rule, iou=iou, weights=own)
        for rule, iou, own in product(RULES, SWEPT_IOUS, weights)
    ]
    found = []
    for candidate in tqdm(candidates, "sweep", unit="setting", leave=False):
        entries = combined(sources, candidate, judge.tune)
        found.append((judge.metrics(entries, judge.tune)["AP"], candidate))
    found.sort(key=lambda pair: -pair[0])
    rows = [
        (c.rule, c.iou, " ".join(f"{w:g}" for w in c.weights), f"{ap:.2f}")
        for ap, c in found[:_SHOWN]
    ]
    print(f"The best of {len(found)} settings, by AP on {len(judge.tune)} images:")
    print(tabulate(rows, ("rule", "IoU", "weights", "AP"), tablefmt="github"))
    return found[0][1]


@dataclass(frozen=True)
class Matches:
    """Detections of some images, each by itself, and whether they are right.

    Attributes:
        scores: ``(N,)``; right: ``(N,)`` bool; categories: ``(N,)`` category ids.
        objects: how many there are to find, by category id.
    """

    scores: np.ndarray
    right: np.ndarray
    categories: np.ndarray
    objects: dict[int | str, int]


def match(entries: Sequence[Entry], judge: Judge, images: frozenset[ImageId]) -> Matches:
    """As COCO matches at IoU 0.5: from the best score down, each detection takes the free object
    of its class that it overlaps most; one that lies in a crowd region instead counts nowhere."""
    truth = judge.objects(images)
    scores, right, categories = [], [], []
    for image, found in by_image(entries).items():
        if image not in images:
            continue
        for category in dict.fromkeys(entry["category_id"] for entry in found):
            own = [entry for entry in found if entry["category_id"] == category]
            own.sort(key=lambda entry: -entry["score"])
            for entry, verdict in zip(own, _verdicts(own, truth.get(image, [])), strict=True):
                if verdict is not None:
                    scores.append(entry["score"])
                    right.append(verdict)
                    categories.append(category)
    objects = {key: 0 for key in judge.reference.classes}
    for own in truth.values():
        for annotation in own:
            objects[annotation["category_id"]] += not annotation["iscrowd"]
    return Matches(
        np.array(scores, float), np.array(right, bool), np.array(categories, object), objects
    )


def _verdicts(found: Sequence[Entry], truth: Sequence[Entry]) -> list[bool | None]:
    """Of detections of one class, the best first; None: in a crowd region."""
    same = [a for a in truth if a["category_id"] == found[0]["category_id"]]
    if not same:
        return [False] * len(found)
    crowd = np.array([a["iscrowd"] for a in same], bool)
    overlaps = mask_utils.iou(
        np.array([e["bbox"] for e in found], float),
        np.array([a["bbox"] for a in same], float),
        crowd.astype(np.uint8).tolist(),
    )
    free = ~crowd
    verdicts: list[bool | None] = []
    for row in overlaps:
        open_row = np.where(free, row, 0)
        if open_row.max() >= _MATCH_IOU:
            free[open_row.argmax()] = False
            verdicts.append(True)
        else:
            verdicts.append(None if (crowd & (row >= _MATCH_IOU)).any() else False)
    return verdicts


def fit_temperatures(sources: Sequence[DetectionFile], judge: Judge) -> tuple[float, ...]:
    """By file, the temperature with which scores say best how often a detection is right.

    It minimizes the log loss of "right at IoU 0.5" (Guo et al., "On Calibration of Modern Neural
    Networks", ICML 2017).
    """
    fitted = []
    for source in sources:
        matches = match(source.entries, judge, judge.tune)
        scores = matches.scores.clip(1e-6, 1 - 1e-6)
        # Of the right answer: minus its logit, divided by the temperature, is what costs.
        logits = np.log(scores / (1 - scores)) * np.where(matches.right, 1, -1)
        losses = [np.logaddexp(0, -logits / value).sum() for value in _TEMPERATURES]
        fitted.append(float(_TEMPERATURES[int(np.argmin(losses))]))
    return tuple(fitted)


def find_thresholds(entries: Sequence[Entry], judge: Judge) -> dict[str, float]:
    """Class name -> score from which on detections give the best F1 at IoU 0.5; prints a table.

    Chosen on the images to choose by. Classes without an object there get no threshold.
    """
    matches = match(entries, judge, judge.tune)
    thresholds, rows, without = {}, [], []
    for key, name in judge.reference.classes.items():
        own = matches.categories == key
        if not matches.objects[key] or not own.any():
            without.append(name)
            continue
        order = np.argsort(-matches.scores[own], kind="stable")
        scores, hits = matches.scores[own][order], matches.right[own][order].cumsum()
        f1 = 2 * hits / (np.arange(1, len(hits) + 1) + matches.objects[key])
        f1[:-1][scores[:-1] == scores[1:]] = -1  # equal scores stay together
        best = int(f1.argmax())
        thresholds[name] = float(scores[best])
        shares = (f1[best], hits[best] / (best + 1), hits[best] / matches.objects[key])
        rows.append((name, f"{scores[best]:.3f}", *(f"{100 * share:.1f}" for share in shares)))
    header = ("class", "threshold", "F1", "precision", "recall")
    print(f"Thresholds of the best F1 at IoU {_MATCH_IOU}, on {len(judge.tune)} images:")
    print(tabulate(rows, header, tablefmt="github", disable_numparse=True))
    if without:
        print(f"note: without objects or detections, no threshold: {shortened(without)}")
    if judge.is_honest:
        held_out = match(above(entries, thresholds, judge.reference), judge, judge.report)
        right, wanted = int(held_out.right.sum()), sum(held_out.objects.values())
        f1 = 200 * right / max(1, len(held_out.right) + wanted)
        print(f"F1 of all classes together on the other {len(judge.report)} images: {f1:.1f}")
    return thresholds


def read_thresholds(path: str, reference: Reference | None) -> dict[str, float]:
    """Class name -> lowest score, from a json file.

    Raises:
        DataError: if it is no such file, or has a class that the data lack.
        ConfigError: if the classes of the data are not known.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not all(
        is_number(value) and 0 <= value <= 1 for value in content.values()
    ):
        raise DataError(f'{path} has no thresholds: write {{"class": 0.5, ..}}, from 0 to 1.')
    if reference is None:
        raise ConfigError("--thresholds needs names of classes: add --annotations FILE.")
    unknown = [name for name in content if name not in reference.classes.values()]
    if unknown:
        raise DataError(
            f"{path} has the classes {shortened(unknown)}, which {reference.path} does not have: "
            "correct the names."
        )
    return {name: float(value) for name, value in content.items()}


def above(
    entries: Sequence[Entry], thresholds: Mapping[str, float], reference: Reference
) -> list[Entry]:
    """Detections whose score reaches the threshold of their class, if that has one."""
    lowest = {key: thresholds.get(name, 0.0) for key, name in reference.classes.items()}
    return [entry for entry in entries if entry["score"] >= lowest[entry["category_id"]]]
