"""YOLO label files: a line per object, with a class number and normalised coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from co_detr.conversion.image_size import ImageSize
from co_detr.conversion.structures import LabelledBox, Labels
from co_detr.conversion.text_file import read_text
from co_detr.data.coco_file import shortened
from co_detr.errors import DataError

# Coordinates may be this much outside of the image, whose edge then clips the box. What is further
# out is no rounding but another format, such as pixels.
_MARGIN = 0.1


def read_yolo_labels(
    path: Path, size: ImageSize, class_names: Sequence[str], keypoints: bool = False
) -> Labels:
    """Reads boxes (``class cx cy w h``) and polygons (``class x y x y x y ...``) as boxes.

    Coordinates are those of the upright image. Oriented boxes (``class`` and four corners) are
    polygons of four points.

    Args:
        keypoints: the lines are boxes with keypoints behind, which are left out.

    Raises:
        DataError: if a line is neither, or its class does not exist.
    """
    boxes = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        where = f"{path} line {number}"
        values = _numbers(fields, where)
        name = _class_name(values[0], class_names, where)
        left, top, right, bottom = _corners(values[1:], keypoints, where)
        scaled = (
            *(left * size.width, top * size.height),
            *(right * size.width, bottom * size.height),
        )
        boxes.append(LabelledBox(name, scaled))
    return Labels(boxes)


def _numbers(fields: list[str], where: str) -> list[float]:
    values = []
    for each in fields:
        try:
            values.append(float(each))
        except ValueError:
            raise DataError(f"{where} has {each!r}, which is no number: correct it.") from None
        if not math.isfinite(values[-1]):
            raise DataError(f"{where} has {each}, which is no finite number: correct it.")
    return values


def _class_name(value: float, class_names: Sequence[str], where: str) -> str:
    if not (value.is_integer() and 0 <= value < len(class_names)):
        raise DataError(
            f"{where} has class {value:g}, but the classes are numbered from 0 to "
            f"{len(class_names) - 1} ({shortened(class_names)}): correct it or add the class."
        )
    return class_names[int(value)]


def _corners(values: list[float], keypoints: bool, where: str) -> tuple[float, float, float, float]:
    """The box (x0, y0, x1, y1), normalised."""
    if len(values) == 4 or (keypoints and len(values) > 4):
        _require_normalised(values[:4], where)
        x, y, width, height = values[:4]
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    if len(values) < 6 or len(values) % 2:
        hint = " (if the last one is a confidence, remove it)" if len(values) == 5 else ""
        raise DataError(
            f"{where} has {len(values)} numbers behind the class{hint}: write four for a box, or "
            "x and y of at least three points."
        )
    _require_normalised(values, where)
    xs, ys = values[0::2], values[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def _require_normalised(values: list[float], where: str) -> None:
    for value in values:
        if not -_MARGIN <= value <= 1 + _MARGIN:
            raise DataError(
                f"{where} has {value:g}, which is not from 0 to 1: divide x and width by the width "
                "of the image, y and height by its height."
            )
