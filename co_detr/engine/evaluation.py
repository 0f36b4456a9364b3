"""Evaluation of detections: the pass over the images, files, and which detector is best.

Boxes are always judged, masks where the model predicts them and the annotation file has them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import math
import os
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader

from co_detr import program
from co_detr.data.coco import BoxChecker
from co_detr.data.coco_classes import dataset_name
from co_detr.data.coco_file import CocoFile, Entry, read_coco
from co_detr.data.segmentation import encoded_mask
from co_detr.errors import ConfigError
from co_detr.files import written_whole
from co_detr.modeling.detectors import DECODER, TOP_K, TTA_KIND

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float]  # from 0 to 100; what is undefined is left out

# What is judged: COCO's names. Metrics of masks are segm/AP and so on, those of boxes AP.
BOXES, MASKS = "bbox", "segm"


class EvaluationStopped(Exception):
    """A process was asked to stop; raised in all of them."""


class _StopCheck(DatasetEvaluator):
    """In front of the other evaluators: stops before they bring their results together."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self.should_stop = should_stop

    def evaluate(self) -> None:
        if any(comm.all_gather(self.should_stop())):
            raise EvaluationStopped


class _Stoppable:
    """A loader that ends early in a process that should stop."""

    def __init__(self, loader: DataLoader, should_stop: Callable[[], bool]) -> None:
        self.loader = loader
        self.should_stop = should_stop

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for batch in self.loader:
            if self.should_stop():
                return
            yield batch


def evaluate(
    model: nn.Module,
    loader: DataLoader,
    evaluator: DetectionEvaluator,
    output_dir: str,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Runs `model` over `loader` and writes `output_dir/metrics.json`.

    Args:
        model: in any mode, which it has afterwards, too.
        loader: of this process's share of the images.
        evaluator: of this process's detections.
        output_dir: for `metrics.json`.
        should_stop: asked before every batch.

    Raises:
        EvaluationStopped: in all processes, if `should_stop` says so in one.

    Returns:
        AP, AP50, AP75, APs, APm, APl and AP-<class>, from 0 to 100, on the main process, where
        the file has null for what is undefined (no box of that size or class); {} elsewhere.
        Masks add `segm/AP` and so on. Detections of another kind, from the same pass, add
        `<kind>/AP` and so on. Without annotations there are no metrics, and `metrics.json` is not
        written.
    """
    kinds = list(getattr(model, "compared", ()))
    evaluators = [evaluator, *(evaluator.of_kind(kind) for kind in kinds)]
    results = inference_on_dataset(
        model, _Stoppable(loader, should_stop), [_StopCheck(should_stop), *evaluators]
    )
    if not comm.is_main_process() or not evaluator.labeled:
        return {}
    print_csv_format({name: results[name] for name in (BOXES, MASKS) if name in results})
    metrics = {name: float(value) for name, value in results.get(BOXES, {}).items()}
    # Those of single classes, AP-<class>, have a file.
    columns = [name for name in metrics if "-" not in name]
    for kind in (MASKS, *kinds, *(f"{kind}/{MASKS}" for kind in kinds)):
        values = results.get(kind, {})
        metrics |= {f"{kind}/{name}": float(value) for name, value in values.items()}
    defined = {name: value for name, value in metrics.items() if math.isfinite(value)}
    path = os.path.join(output_dir, "metrics.json")
    os.makedirs(output_dir, exist_ok=True)
    with written_whole(path) as file:
        json.dump({name: defined.get(name) for name in metrics}, file, indent=2)
        file.write("\n")
    if kinds:
        table = detector_table(defined, kinds, columns)
        logger.info("Detectors of this model, from one pass over the images:\n%s", table)
    logger.info("Metrics are in %s", path)
    return defined


class DetectionEvaluator(DatasetEvaluator):
    """Gathers the detections of all processes, writes them in COCO's result format, judges them.

    Detections are those of a file that `load_coco` has read, and are written with its ids of images
    and categories. A file without annotations has nothing to judge by. Masks are judged if the
    detections have some, by their own scores if these are predicted, and only if no object of the
    file is without a mask: one would never be found.

    A model may return several kinds of detections for one image, under ``instances`` and
    ``instances_<kind>`` (see ``CoDETR.compared``). Each kind has an evaluator of its own; only the
    one of ``instances`` says in the log what it finds, as `evaluate` compares them all.

    Args:
        annotation_file: read again, as `read_coco` corrects it.
        output_dir: where files are written; None: nowhere.
        max_detections: best detections that count.

    Raises:
        ConfigError: if ``max_detections`` is below 1.
    """

    results_name: str

    def __init__(self, annotation_file: str, output_dir: str | None, max_detections: int) -> None:
        if not (isinstance(max_detections, int) and max_detections >= 1):
            raise ConfigError(
                f"dataloader.evaluator.max_detections={max_detections} must be a whole number of "
                "at least 1."
            )
        self.annotation_file = annotation_file
        self.output_dir = output_dir
        self.max_detections = max_detections
        self.kind = ""
        self.metadata = MetadataCatalog.get(dataset_name(annotation_file))
        self.dataset = usable_dataset(read_coco(annotation_file))
        self._detections: list[list[Entry]] = []
        self._with_masks = False
        self._masked: dict[str, list[Entry]] | None = None
        self._images: Collection[int | str] | None = None  # None: all

    @property
    def labeled(self) -> bool:
        """Whether there is something to judge detections by."""
        return bool(self.dataset["annotations"])

    @property
    def results_path(self) -> str | None:
        """Of the file with the detections."""
        return self.output_dir and os.path.join(self.output_dir, self.results_name)

    def of_kind(self, kind: str) -> DetectionEvaluator:
        """A copy that reads ``instances_<kind>``, writes its files to the directory ``<kind>``
        inside its own, and reports its metrics under ``kind`` instead of ``bbox``."""
        other = copy.copy(self)
        other.kind = kind
        other.reset()
        if self.output_dir:
            other.output_dir = os.path.join(self.output_dir, kind)
        return other

    def on_images(self, images: Collection[int | str]) -> DetectionEvaluator:
        """A copy that judges by these images of the file alone."""
        other = copy.copy(self)
        other.dataset = _of_images(self.dataset, images)
        other._masked = None
        other._images = images
        return other

    def reset(self) -> None:
        self._detections = []
        self._with_masks = False

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        key = f"instances_{self.kind}" if self.kind else "instances"
        for sample, output in zip(inputs, outputs, strict=True):
            found = output[key].to(torch.device("cpu"))
            self._detections.append(result_entries(found, sample["image_id"]))
            self._with_masks |= found.has("pred_masks")

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Metrics under "bbox", or the kind, and under "segm", or "<kind>/segm", in the main
        process; {} without annotations."""
        comm.synchronize()
        gathered = comm.gather((self._detections, self._with_masks), dst=0)
        if not comm.is_main_process():
            return {}
        parts = [picked for picked, _ in gathered]
        detections = self._with_own_ids(chain.from_iterable(chain.from_iterable(parts)))
        if self.results_path is not None:
            os.makedirs(os.path.dirname(self.results_path) or ".", exist_ok=True)
            self._log(logging.INFO, "Saving detections to %s", self.results_path)
            with written_whole(self.results_path) as file:
                json.dump(detections, file)
        if not self.labeled:
            self._log(
                logging.WARNING,
                "%s has no annotations: there is nothing to evaluate. %s",
                self.annotation_file,
                f"The {len(detections)} detections are in {self.results_path}."
                if self.results_path
                else f"There are {len(detections)} detections.",
            )
            return {}
        quiet = contextlib.redirect_stdout(io.StringIO())  # the APIs of COCO and LVIS print
        with quiet if self.kind else contextlib.nullcontext():
            results = {self.kind or BOXES: self.judge(detections)}
            if any(with_masks for _, with_masks in gathered) and self._can_judge_masks():
                masks = f"{self.kind}/{MASKS}" if self.kind else MASKS
                results[masks] = self.judge(as_masks(detections), MASKS)
            return results

    def judge(self, detections: list[Entry], iou_type: str = BOXES) -> dict[str, float]:
        """Metrics from 0 to 100, NaN where undefined; may change the detections.

        Args:
            detections: in COCO's result format, for masks as `as_masks` gives them.
            iou_type: `BOXES` or `MASKS`.
        """
        raise NotImplementedError

    def ground_truth(self, iou_type: str) -> dict[str, list[Entry]]:
        """What boxes or masks are judged by; see `usable_dataset`.

        Masks are read when they are asked for: most models predict none.
        """
        if iou_type == BOXES:
            return self.dataset
        if self._masked is None:
            masked = usable_dataset(read_coco(self.annotation_file), with_masks=True)
            self._masked = masked if self._images is None else _of_images(masked, self._images)
        return self._masked

    def _can_judge_masks(self) -> bool:
        """Whether the file has them; if not, a message says so."""
        problem = missing_masks(self.annotation_file, self.ground_truth(MASKS))
        if problem is not None:
            self._log(logging.WARNING, "%s Only boxes are evaluated.", problem)
        return problem is None

    def log_table(self, title: str, table: str) -> None:
        self._log(logging.INFO, "%s:\n%s", title, table)

    def _log(self, level: int, message: str, *arguments: Any) -> None:
        if not self.kind:
            logger.log(level, message, *arguments)

    def _with_own_ids(self, detections: Any) -> list[Entry]:
        """Detections with category ids of the file; those of classes that it lacks are left out."""
        numbers = self.metadata.thing_dataset_id_to_contiguous_id
        own = {category["id"] for category in self.dataset["categories"]}
        ids = {number: key for key, number in numbers.items() if key in own or not own}
        return [
            detection | {"category_id": ids[detection["category_id"]]}
            for detection in detections
            if detection["category_id"] in ids
        ]


def result_entries(found: Instances, image_id: int | str) -> list[Entry]:
    """Detections of one image in COCO's result format, best first.

    Args:
        found: on the CPU, with `DetectedMasks` if there are masks.

    Returns:
        ``image_id``, ``category_id`` (contiguous), ``bbox`` (x, y, w, h) and ``score``; of masks
        also ``segmentation`` in run-length form and, if the model predicts how good masks are,
        ``mask_score``, by which they are ranked instead.
    """
    fields = dict(found.get_fields())
    masks = fields.pop("pred_masks", None)
    entries = instances_to_coco_json(Instances(found.image_size, **fields), image_id)
    added = {} if masks is None else {"segmentation": masks.rles()}
    if found.has("mask_scores"):
        added["mask_score"] = found.mask_scores.tolist()
    for key, values in added.items():
        for entry, value in zip(entries, values, strict=True):
            entry[key] = value
    return entries


def as_masks(detections: list[Entry]) -> list[Entry]:
    """Entries of masks alone, with their own scores: areas are then those of masks, too."""
    return [
        {
            "image_id": detection["image_id"],
            "category_id": detection["category_id"],
            "segmentation": detection["segmentation"],
            "score": detection.get("mask_score", detection["score"]),
        }
        for detection in detections
    ]


def usable_dataset(content: CocoFile, with_masks: bool = False) -> dict[str, list[Entry]]:
    """What evaluations read of an annotation file, as a copy that they may change.

    Boxes that have no area inside their image, which no detection could match, are left out, and
    annotations are numbered anew: the COCO API miscounts ids that are 0, missing or repeated.

    Args:
        with_masks: keep masks, in run-length form, which takes little memory: ``segmentation`` is
            None where there is none. A crowd region without one is its box.
    """
    images = {image["id"]: {"file_name": "", **image} for image in content.images}
    boxes = BoxChecker(content.path, "skip")
    annotations = []
    for annotation in content.annotations:
        image = images[annotation["image_id"]]
        if boxes.clip(annotation, image) is None:
            continue
        kept = {key: value for key, value in annotation.items() if key != "segmentation"}
        if with_masks:
            size = image["height"], image["width"]
            kept["segmentation"] = encoded_mask(annotation.get("segmentation"), *size)
            if kept["segmentation"] is None and kept["iscrowd"]:
                x, y, width, height = kept["bbox"]
                corners = [x, y, x + width, y, x + width, y + height, x, y + height]
                kept["segmentation"] = encoded_mask([corners], *size)
        annotations.append(kept | {"id": len(annotations) + 1})
    return {
        "info": {},
        "images": content.images,
        "annotations": annotations,
        "categories": content.categories,
    }


def _of_images(
    dataset: Mapping[str, list[Entry]], images: Collection[int | str]
) -> dict[str, list[Entry]]:
    return {
        **dataset,
        "images": [image for image in dataset["images"] if image["id"] in images],
        "annotations": [a for a in dataset["annotations"] if a["image_id"] in images],
    }


def missing_masks(path: str, dataset: Mapping[str, list[Entry]]) -> str | None:
    """Why masks cannot be judged by a file, in one sentence; None: they can be.

    Args:
        dataset: `usable_dataset` of the file, with masks.
    """
    annotations = dataset["annotations"]
    without = [annotation for annotation in annotations if annotation["segmentation"] is None]
    if not without:
        return None
    share = "no" if len(without) == len(annotations) else "not every"
    first = without[0]
    return (
        f"{path} has {share} mask for its objects ({len(without)} of {len(annotations)} have none; "
        f"the first is in image {first['image_id']!r}, box {first['bbox']}): add a segmentation, "
        "polygons or run lengths of the image's size, to evaluate masks."
    )


def metrics_of(metrics: Metrics, kind: str) -> dict[str, float]:
    """The metrics of one kind of detections: ``<kind>/AP``, or ``AP`` itself for the decoder."""
    if kind == DECODER:
        return dict(metrics)
    prefix = f"{kind}/"
    return {
        key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)
    }


def logged_name(metric: str) -> str:
    """The name of a metric in a run's history, which is Detectron2's: "bbox/AP50", "segm/AP"."""
    return metric if metric.startswith(f"{MASKS}/") else f"{BOXES}/{metric}"


def detector_table(metrics: Metrics, kinds: Sequence[str], columns: Sequence[str]) -> str:
    """One line for the decoder and for each kind; the best AP is marked.

    Args:
        metrics: as `evaluate` returns them.
        kinds: of detections beside the decoder's.
        columns: names of metrics.
    """
    best = best_detector(metrics, kinds)
    rows = []
    for kind in (DECODER, *kinds):
        own = metrics_of(metrics, kind)
        numbers = [f"{own[name]:.1f}" if name in own else "" for name in columns]
        rows.append((kind, *numbers, "best AP" if kind == best else ""))
    align = ("left", *("right" for _ in columns), "left")
    headers = ("detector", *columns, "")
    return tabulate(rows, headers, tablefmt="github", colalign=align, disable_numparse=True)


def best_detector(metrics: Metrics, kinds: Sequence[str]) -> str | None:
    """Of all that can be asked for by name; the first one of equals, None without an AP."""
    found = {
        kind: metrics_of(metrics, kind)["AP"]
        for kind in (DECODER, *kinds)
        if kind not in (TOP_K, TTA_KIND) and "AP" in metrics_of(metrics, kind)
    }
    return max(found, key=found.__getitem__, default=None)


def log_best_detector(metrics: Metrics, kinds: Sequence[str], config: str, checkpoint: str) -> None:
    """Names the best detector of a model that has several, and the command that uses it.

    Args:
        config, checkpoint: files that the command names; without a checkpoint there is nothing to
            use, and nothing is logged.
    """
    best = best_detector(metrics, kinds)
    if best is None or not checkpoint or not set(kinds) - {TOP_K}:
        return
    command = [*program("predict"), "--config-file", config, "--checkpoint", checkpoint]
    command += [] if best == DECODER else ["--detector", best]
    own, decoder = metrics_of(metrics, best), metrics.get("AP")
    beside = "" if best == DECODER or decoder is None else f"; the decoder has {decoder:.1f}"
    logger.info(
        "The best detector of this model is %s (AP %.1f%s). To use it:\n  %s IMAGES --output drawn",
        *(best, own["AP"], beside, shlex.join(command)),
    )
