"""COCO evaluation: detections and metrics as files."""

from __future__ import annotations

import json
import logging
import math
import os

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from co_detr.data.coco import dataset_name

logger = logging.getLogger(__name__)


class CocoBoxEvaluator(COCOEvaluator):
    """Detectron2's `COCOEvaluator` for box detections on a file that `load_coco` has read.

    It uses the official COCO API (no compiled code), writes `coco_instances_results.json` to
    `output_dir`, and accepts annotations without `iscrowd` and `area`, as `load_coco` does: they
    default to 0 and the box area.
    """

    def __init__(self, annotation_file: str, output_dir: str | None = None) -> None:
        # The loader has registered the name already; the evaluator only needs the json path.
        name = dataset_name(annotation_file)
        if not MetadataCatalog.get(name).get("json_file"):
            MetadataCatalog.get(name).json_file = annotation_file
        super().__init__(name, tasks=("bbox",), output_dir=output_dir, use_fast_impl=False)
        self._coco_api.dataset.setdefault("info", {})
        for annotation in self._coco_api.anns.values():
            _, _, width, height = annotation["bbox"]
            annotation.setdefault("iscrowd", 0)
            annotation.setdefault("area", width * height)


def evaluate(
    model: nn.Module, loader: DataLoader, evaluator: COCOEvaluator, output_dir: str
) -> dict[str, float]:
    """Runs `model` over `loader` and writes `output_dir/metrics.json`.

    Returns:
        AP, AP50, AP75, APs, APm, APl and AP-<class>, from 0 to 100, on the main process, where
        the file has null for what is undefined (no box of that size or class); {} elsewhere.
    """
    results = inference_on_dataset(model, loader, evaluator)
    if not comm.is_main_process():
        return {}
    print_csv_format(results)
    metrics = {name: float(value) for name, value in results.get("bbox", {}).items()}
    defined = {name: value for name, value in metrics.items() if math.isfinite(value)}
    path = os.path.join(output_dir, "metrics.json")
    os.makedirs(output_dir, exist_ok=True)
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump({name: defined.get(name) for name in metrics}, file, indent=2)
        file.write("\n")
    os.replace(f"{path}.tmp", path)
    logger.info("Metrics are in %s", path)
    return defined
