"""LVIS evaluation with the package `lvis`, which is installed by those who need it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import LVISEvaluator

from co_detr.data.coco import dataset_name
from co_detr.engine.evaluation import BoxEvaluator
from co_detr.errors import ConfigError


class LvisBoxEvaluator(BoxEvaluator, LVISEvaluator):
    """Detectron2's `LVISEvaluator` for box detections on a file that `load_lvis` has read.

    Reports AP, AP50, AP75, by size (APs, APm, APl) and by frequency of the class in the training
    set (APr, APc, APf: rare, common, frequent). A class counts only in images that were searched
    for it. Writes `lvis_instances_results.json` to `output_dir`.

    Args:
        max_detections: best detections of each image that count; 300 is LVIS's own limit.

    Raises:
        ConfigError: if `lvis` is not installed.
    """

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
        name = dataset_name(annotation_file)
        if not MetadataCatalog.get(name).get("json_file"):
            MetadataCatalog.get(name).json_file = annotation_file
        super().__init__(
            name, tasks=("bbox",), output_dir=output_dir, max_dets_per_image=max_detections
        )

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        with _numpy_with_float():
            return super().evaluate()


@contextlib.contextmanager
def _numpy_with_float() -> Iterator[None]:
    """The last release of `lvis`, of 2020, uses `numpy.float`, which NumPy removed in 1.24."""
    if hasattr(np, "float"):
        yield
        return
    np.float = float
    try:
        yield
    finally:
        del np.float
