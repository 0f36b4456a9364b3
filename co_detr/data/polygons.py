"""Masks of COCO-format annotations as polygons."""

from __future__ import annotations

from numbers import Real
from typing import Any

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
