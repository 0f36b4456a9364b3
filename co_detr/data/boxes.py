"""Checks of annotated boxes against their images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from co_detr.data.coco_file import is_box
from co_detr.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

# Annotation tools round to whole pixels: less than this outside the image is not worth a warning.
ROUNDING_PIXELS = 1.0


def require_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Raises a ConfigError if the setting `key` is none of `choices`."""
    if value not in choices:
        *others, last = (f'"{choice}"' for choice in choices)
        raise ConfigError(f'{key} is "{value}" but can only be {", ".join(others)} or {last}.')


@dataclass(frozen=True)
class SkippedBox:
    """A box that was left out: `kind` completes "boxes that ..."."""

    where: str
    kind: str


def is_typed_box(box: Any) -> bool:
    """Whether it is a list of four numbers, of which some may be missing (NaN, infinite, null).

    Anything else, such as text, is a mistake of the whole file rather than of one box.
    """
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(
            value is None or (isinstance(value, Real) and not isinstance(value, bool))
            for value in box
        )
    )


class BoxChecker:
    """Clips boxes to their images and counts what it had to change.

    A box that has no area inside its image is an error, or is left out if `invalid_boxes` is
    "skip". A box that is partly outside is clipped; `report` warns once for the whole file.
    """

    def __init__(self, annotation_file: str, invalid_boxes: str) -> None:
        require_choice("data.invalid_boxes", invalid_boxes, ("error", "skip"))
        self.annotation_file = annotation_file
        self.skip_invalid = invalid_boxes == "skip"
        self.skipped: list[SkippedBox] = []
        self.clipped: list[str] = []

    def clip(self, annotation: dict[str, Any], record: dict[str, Any]) -> list[float] | None:
        """Returns the box (x, y, w, h) inside the image, or None if it is to be left out.

        Raises:
            DataError: if the box is no list of four numbers, whatever `invalid_boxes` is; or if
                one of them is not finite, or the box has no area inside the image.
        """
        box = annotation["bbox"]
        where = f"annotation {annotation.get('id')!r} of image {record['file_name']}"
        if not is_typed_box(box):
            raise DataError(
                f"{where} in {self.annotation_file} has the bbox {box!r}, which is no list of four "
                "numbers: write x, y, w and h as numbers, without quotes."
            )
        if not is_box(box):
            problem = f"its bbox {box} is not four finite numbers (x, y, w, h)"
            return self._invalid(where, "are not four finite numbers", problem)
        x, y, width, height = (float(value) for value in box)
        if width <= 0 or height <= 0:
            problem = f"its bbox {box} (x, y, w, h) has no area"
            return self._invalid(where, "have no area", problem)
        left, top = max(x, 0.0), max(y, 0.0)
        right, bottom = min(x + width, record["width"]), min(y + height, record["height"])
        if right <= left or bottom <= top:
            size = f"{record['width']}x{record['height']}"
            problem = f"its bbox {box} (x, y, w, h) is outside the {size} image"
            return self._invalid(where, "are outside their image", problem)
        outside = max(left - x, top - y, x + width - right, y + height - bottom)
        if outside > ROUNDING_PIXELS:
            self.clipped.append(where)
        return [left, top, right - left, bottom - top]

    def report(self) -> None:
        """Logs at most one warning per kind of change."""
        for boxes, change in (
            (self.clipped, "are partly outside their image and were clipped"),
            (
                [box.where for box in self.skipped],
                "have no area inside their image and were left out (correct the file, or set "
                "data.invalid_boxes=error to stop here)",
            ),
        ):
            if boxes:
                logger.warning(
                    "%s: %d boxes %s, the first is %s.",
                    self.annotation_file,
                    len(boxes),
                    change,
                    boxes[0],
                )

    def _invalid(self, where: str, kind: str, problem: str) -> None:
        if not self.skip_invalid:
            raise DataError(
                f"{where} in {self.annotation_file} is unusable, {problem}: correct or remove it, "
                "or set data.invalid_boxes=skip to leave such boxes out."
            )
        self.skipped.append(SkippedBox(f"{where}, {problem}", kind))
