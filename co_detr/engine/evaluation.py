"""Evaluation of box detections: detections and metrics as files."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.utils import comm
from pycocotools.coco import COCO
from torch import nn
from torch.utils.data import DataLoader

from co_detr.data.boxes import BoxChecker
from co_detr.data.coco import dataset_name
from co_detr.engine.class_table import class_results, format_classes, write_classes
from co_detr.files import written_whole

logger = logging.getLogger(__name__)


class BoxEvaluator(DatasetEvaluator):
    """Base of evaluators that can read other detections than those of ``instances``.

    A model may return several kinds of detections for one image, under ``instances`` and
    ``instances_<kind>`` (see ``CoDETR.compare_top_k``).
    """

    kind = ""
    _output_dir: str | None

    def of_kind(self, kind: str) -> BoxEvaluator:
        """A copy that reads ``instances_<kind>``, writes its files to the directory ``<kind>``
        inside its own, and reports its metrics under ``kind`` instead of ``bbox``."""
        other = copy.copy(self)
        other.kind = kind
        if self._output_dir:
            other._output_dir = os.path.join(self._output_dir, kind)
        return other

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        key = f"instances_{self.kind}" if self.kind else "instances"
        super().process(inputs, [{"instances": output[key]} for output in outputs])

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        results = super().evaluate()
        if self.kind and results and "bbox" in results:
            return {self.kind: results["bbox"]}
        return results


class CocoBoxEvaluator(BoxEvaluator, COCOEvaluator):
    """Detectron2's `COCOEvaluator` for box detections on a file that `load_coco` has read.

    It uses the official COCO API (no compiled code), writes `coco_instances_results.json` and
    `per_class_ap.csv` to `output_dir`, and accepts what `load_coco` accepts:

    - annotations without `iscrowd` and `area`, which default to 0 and the box area;
    - boxes that have no area inside their image, which no detection could match: left out;
    - annotation ids that are 0, missing or repeated, for which the COCO API miscounts: renumbered;
    - fewer classes than the model's (`align_classes`): detections of others are left out.
    """

    def __init__(self, annotation_file: str, output_dir: str | None = None) -> None:
        # The loader has registered the name already; the evaluator only needs the json path.
        name = dataset_name(annotation_file)
        if not MetadataCatalog.get(name).get("json_file"):
            MetadataCatalog.get(name).json_file = annotation_file
        with _numbered_annotations():
            super().__init__(name, tasks=("bbox",), output_dir=output_dir, use_fast_impl=False)
        dataset = self._coco_api.dataset
        dataset.setdefault("info", {})
        images = {image["id"]: image for image in dataset["images"]}
        boxes = BoxChecker(annotation_file, "skip")
        dataset["annotations"] = [
            annotation
            for annotation in dataset["annotations"]
            if boxes.clip(annotation, images[annotation["image_id"]]) is not None
        ]
        for number, annotation in enumerate(dataset["annotations"], start=1):
            _, _, width, height = annotation["bbox"]
            annotation["id"] = number
            annotation.setdefault("iscrowd", 0)
            annotation.setdefault("area", width * height)
        with contextlib.redirect_stdout(io.StringIO()):  # it says "creating index..."
            self._coco_api.createIndex()

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: list[int] | None = None
    ) -> None:
        ids = self._metadata.thing_dataset_id_to_contiguous_id
        judged = {contiguous for key, contiguous in ids.items() if key in self._coco_api.cats}
        kept = [
            prediction
            | {"instances": [d for d in prediction["instances"] if d["category_id"] in judged]}
            for prediction in predictions
        ]
        super()._eval_predictions(kept, img_ids)

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        results = super()._derive_coco_results(coco_eval, iou_type)  # without its table of classes
        if coco_eval is None:  # there is no detection at all
            return results
        order = self._metadata.thing_dataset_id_to_contiguous_id
        classes = class_results(coco_eval, self._coco_api, order)
        logger.info(
            "Results by class%s:\n%s",
            f" ({self.kind})" if self.kind else "",
            format_classes(classes),
        )
        if self._output_dir:
            write_classes(classes, self._output_dir)
        return results | {f"AP-{each.name}": each.ap for each in classes}


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
    evaluator: BoxEvaluator,
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
        Detections of another kind, from the same pass, add `<kind>/AP` and so on.
    """
    kinds = ["top_k"] if getattr(model, "compare_top_k", False) else []
    evaluators = [evaluator, *(evaluator.of_kind(kind) for kind in kinds)]
    results = inference_on_dataset(
        model, _Stoppable(loader, should_stop), [_StopCheck(should_stop), *evaluators]
    )
    if not comm.is_main_process():
        return {}
    print_csv_format(results)
    metrics = {name: float(value) for name, value in results.get("bbox", {}).items()}
    for kind in kinds:
        values = results.get(kind, {})
        metrics |= {f"{kind}/{name}": float(value) for name, value in values.items()}
    defined = {name: value for name, value in metrics.items() if math.isfinite(value)}
    path = os.path.join(output_dir, "metrics.json")
    os.makedirs(output_dir, exist_ok=True)
    with written_whole(path) as file:
        json.dump({name: defined.get(name) for name in metrics}, file, indent=2)
        file.write("\n")
    logger.info("Metrics are in %s", path)
    return defined


@contextlib.contextmanager
def _numbered_annotations() -> Iterator[None]:
    """The COCO API wants an id of every annotation as soon as it reads a file."""
    create_index = COCO.createIndex

    def number_first(coco: COCO) -> None:
        for number, annotation in enumerate(coco.dataset["annotations"], start=1):
            annotation["id"] = number
        create_index(coco)

    COCO.createIndex = number_first
    try:
        yield
    finally:
        COCO.createIndex = create_index
