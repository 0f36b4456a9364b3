"""Masks of COCO-format annotations as polygons."""

from __future__ import annotations

from numbers import Real
from typing import Any

import pycocotools.mask as mask_utils

from co_detr.errors import DataError


def checked_polygons(segmentation: Any, where: str) -> list[list[float]]:
    """The polygons of one annotation.

    Args:
        segmentation: as it stands in the file; None: not there.
        where: what an error calls the annotation.

    Raises:
        DataError: if it is no list of polygons with at least three points.
    """
    if segmentation is None:
        raise DataError(
            f"{where} has no segmentation: add one, or do without masks, in training with "
            "dataloader.train.dataset.with_masks=false and a head that needs none, in a val set "
            "with train.val_loss.enabled=false."
        )
    if isinstance(segmentation, dict):
        raise DataError(f"{where} has a run-length encoded mask: write it as polygons.")
    if not isinstance(segmentation, list) or not segmentation:
        raise DataError(f"{where} has the segmentation {segmentation!r}: write a list of polygons.")
    for polygon in segmentation:
        is_polygon = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        if not is_polygon or not all(isinstance(each, Real) for each in polygon):
            raise DataError(
                f"{where} has a polygon that is not [x, y, x, y, ..] of at least three points: "
                "mend or remove it."
            )
    return segmentation


def enclosing_box(segmentation: Any) -> list[float] | None:
    """The box (x, y, w, h) around polygons or a run-length mask; None if there is no area."""
    if isinstance(segmentation, dict):
        return _box_of_mask(segmentation)
    polygons = segmentation if isinstance(segmentation, list) else []
    numbers = [polygon for polygon in polygons if isinstance(polygon, list)]
    if not numbers or not all(isinstance(value, Real) for part in numbers for value in part):
        return None
    xs = [value for part in numbers for value in part[0::2]]
    ys = [value for part in numbers for value in part[1::2]]
    if len(xs) < 3 or len(xs) != len(ys):
        return None
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    return box if box[2] > 0 and box[3] > 0 else None


def _box_of_mask(segmentation: dict[str, Any]) -> list[float] | None:
    counts, size = segmentation.get("counts"), segmentation.get("size")
    if not isinstance(size, list) or len(size) != 2 or not isinstance(counts, list | str):
        return None
    try:
        if isinstance(counts, list):
            segmentation = mask_utils.frPyObjects(segmentation, *size)
        box = mask_utils.toBbox(segmentation).tolist()
    except (TypeError, ValueError):  # numbers that are none
        return None
    return box if box[2] > 0 and box[3] > 0 else None
