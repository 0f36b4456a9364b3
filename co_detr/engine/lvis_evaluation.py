"""LVIS evaluation with the package `lvis`, which is installed by those who need it."""

from __future__ import annotations

import logging
import math
from types import FunctionType
from typing import Any

import numpy as np
from detectron2.utils.logger import create_small_table

from co_detr.data.coco_file import Entry
from co_detr.engine.evaluation import BoxEvaluator
from co_detr.errors import ConfigError

logger = logging.getLogger(__name__)

_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")


class LvisBoxEvaluator(BoxEvaluator):
    """LVIS's own evaluation of box detections on a file that `load_lvis` has read.

    Reports AP, AP50, AP75, by size (APs, APm, APl) and by frequency of the class in the training
    set (APr, APc, APf: rare, common, frequent). A class counts only in images that were searched
    for it. Writes `lvis_instances_results.json` to `output_dir`.

    Args:
        max_detections: best detections of each image that count; 300 is LVIS's own limit.

    Raises:
        ConfigError: if `lvis` is not installed.
    """

    results_name = "lvis_instances_results.json"

    def __init__(
        self, annotation_file: str, output_dir: str | None = None, max_detections: int = 300
    ) -> None:
        try:
            import lvis  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "evaluation on LVIS needs the package lvis, which cannot be imported here "
                f"({error}): run pip install lvis."
            ) from error
        super().__init__(annotation_file, output_dir, max_detections)

    def judge(self, detections: list[Entry]) -> dict[str, float]:
        from lvis import LVISResults

        if not detections:  # the package wants at least one
            logger.warning("The model has not detected anything.")
            return dict.fromkeys(_METRICS, math.nan)
        truth = _dataset(self.dataset)
        logger.info("Up to %d detections count in an image.", self.max_detections)
        found = LVISResults(truth, detections, max_dets=self.max_detections)
        evaluation = _evaluation_class()(truth, found, "bbox")
        evaluation.run()
        evaluation.print_results()
        results = evaluation.get_results()
        # -1 stands for undefined.
        metrics = {
            name: 100 * float(results[name]) if results[name] >= 0 else math.nan
            for name in _METRICS
        }
        self.log_table("Evaluation results for boxes", create_small_table(metrics))
        return metrics


def _dataset(content: dict[str, list[Entry]]) -> Any:
    """`lvis.LVIS` of a data set in memory, where its own constructor wants a file."""
    from lvis import LVIS

    class Dataset(LVIS):
        def __init__(self) -> None:
            self.logger = logging.getLogger("lvis.lvis")
            self.dataset = content
            self._create_index()

    return Dataset()


def _evaluation_class() -> Any:
    """`LVISEval` for today's NumPy.

    The last release of `lvis`, of 2020, uses `numpy.float`, which NumPy removed in 1.24. One method
    does: here it runs with a name `np` that still has it, and nothing is changed for others.
    """
    from lvis import LVISEval

    class Numpy:
        float = float

        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

    method = LVISEval.accumulate
    names = method.__globals__ | {"np": Numpy()}
    renewed = FunctionType(method.__code__, names, method.__name__, method.__defaults__)
    return type("LVISEval", (LVISEval,), {"accumulate": renewed})
