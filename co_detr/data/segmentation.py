"""Masks in annotation files: what they write as ``segmentation``, and what is wrong with it.

A file may mix polygons with run lengths, compressed or not. Whoever reads a mask gets it from here:
the loader and the preflight through `check_mask`, evaluations and tools through `encoded_mask`.
Masks stay as small as they are in files; `co_detr.data.masks` makes bitmaps of them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import pycocotools.mask as mask_utils

from co_detr.errors import DataError

logger = logging.getLogger(__name__)

# Polygons ``[(2P,) float64, ..]`` in pixels, or ``{"size": [h, w], "counts": compressed text}``.
Segmentation = list[np.ndarray] | dict[str, Any]

# Sides of the image that a polygon may reach out of it. pycocotools walks along the edges step by
# step, with a memory that grows with them.
_FAR = 10


@dataclass(frozen=True)
class MaskFlaw:
    """Something that is wrong with masks.

    Attributes:
        what: in the plural.
        remedy: what to do.
        stops: whether nothing goes on with it, as it is a mistake of the whole file. Otherwise it
            is an error, or left out, as ``data.invalid_boxes`` says.
        read_as: how it is read all the same; "" if it cannot be.
    """

    what: str
    remedy: str
    stops: bool = False
    read_as: str = ""


WRONG_TYPE = MaskFlaw(
    "segmentations that are neither polygons nor run lengths",
    'write [[x, y, x, y, ..]] with numbers, or {"size": [height, width], "counts": ..}',
    stops=True,
)
OTHER_SIZE = MaskFlaw(
    "run-length masks of another size than their image",
    "write size as [height, width] of the image, and the run lengths for it",
    stops=True,
)
WRONG_SUM = MaskFlaw(
    "run-length masks whose counts do not sum to height times width", "write the mask again"
)
DAMAGED = MaskFlaw("run-length masks whose counts are damaged", "write the mask again")
FEW_POINTS = MaskFlaw("polygons of fewer than three points", "remove them, or draw the object")
ODD_NUMBER = MaskFlaw("polygons with an odd number of coordinates", "write x and y of every point")
NOT_FINITE = MaskFlaw(
    "polygons with coordinates that are NaN, infinite or null", "write numbers in their place"
)
OUTSIDE = MaskFlaw("masks outside of their image", "write them in pixels of this image")
NO_PIXEL = MaskFlaw("masks without area", "draw the object, or remove the mask")
NOT_NESTED = MaskFlaw(
    "polygons that are no list in a list", "", read_as="read as one polygon for the object"
)
PAIRS = MaskFlaw(
    "polygons that are lists of points", "", read_as="read as x and y of one point after the other"
)


@dataclass(frozen=True)
class CheckedMask:
    """The mask of one object.

    Attributes:
        usable: None if there is no mask, or nothing is left of it.
        flaws: with what is there, as part of a sentence.
    """

    usable: Segmentation | None
    flaws: tuple[tuple[MaskFlaw, str], ...] = ()


def check_mask(segmentation: Any, height: int, width: int) -> CheckedMask:
    """Reads the ``segmentation`` of an annotation.

    Args:
        segmentation: as it stands in the file; None and [] are no mask.
        height, width: of the image in pixels.
    """
    if segmentation is None or (isinstance(segmentation, list) and not segmentation):
        return CheckedMask(None)
    if isinstance(segmentation, list):
        return _check_polygons(segmentation, height, width)
    if isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys():
        return _check_run_lengths(segmentation, height, width)
    return _flawed(WRONG_TYPE, _shortly(segmentation))


def _flawed(flaw: MaskFlaw, says: str) -> CheckedMask:
    return CheckedMask(None, ((flaw, says),))


def _shortly(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}.."


def _check_polygons(polygons: list[Any], height: int, width: int) -> CheckedMask:
    flaws: list[tuple[MaskFlaw, str]] = []
    if all(value is None or _is_number(value) for value in polygons):
        flaws.append((NOT_NESTED, _shortly(polygons)))
        polygons = [polygons]
    kept = []
    for polygon in polygons:
        points = _numbers_of(polygon)
        if points is None:
            return _flawed(WRONG_TYPE, _shortly(polygon))
        if points.ndim == 2:
            flaws.append((PAIRS, _shortly(polygon)))
            points = points.reshape(-1)
        if len(points) % 2:
            flaws.append((ODD_NUMBER, f"{len(points)} numbers"))
        elif len(points) < 6:
            flaws.append((FEW_POINTS, f"{len(points) // 2} points"))
        elif not np.isfinite(points).all():
            flaws.append((NOT_FINITE, _shortly(polygon)))
        else:
            kept.append(points)
    if not kept:
        return CheckedMask(None, tuple(flaws))
    left, top, right, bottom = extent_of(kept)
    far = _FAR * max(height, width)
    is_outside = left >= width or top >= height or right <= 0 or bottom <= 0
    if is_outside or min(left, top) < -far or max(right, bottom) > far:
        box = f"from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) in {width}x{height} pixels"
        return CheckedMask(None, (*flaws, (OUTSIDE, box)))
    if not any(_area(points) for points in kept):
        return CheckedMask(None, (*flaws, (NO_PIXEL, _shortly(kept[0].tolist()))))
    return CheckedMask(kept, tuple(flaws))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _numbers_of(polygon: Any) -> np.ndarray | None:
    """``(N,)`` or, of a list of points, ``(N, 2)`` float64, with NaN for null; None if it is
    neither."""
    if not isinstance(polygon, list | tuple | np.ndarray):
        return None
    try:
        values = np.asarray(polygon)
        if values.dtype == object and all(
            value is None or _is_number(value) for value in values.flat
        ):
            values = values.astype(np.float64)
    except (ValueError, OverflowError):  # lists of different lengths in it, or endless numbers
        return None
    if values.dtype.kind not in "iuf" or not (
        values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 2)
    ):
        return None
    return values.astype(np.float64)


def _area(points: np.ndarray) -> float:
    """Of a polygon (2P,), by the shoelace formula."""
    x, y = points[0::2], points[1::2]
    # np.roll would take most of the time of a check.
    doubled = (x[1:] @ y[:-1] + x[0] * y[-1]) - (y[1:] @ x[:-1] + y[0] * x[-1])
    return 0.5 * abs(float(doubled))


def _check_run_lengths(mask: dict[str, Any], height: int, width: int) -> CheckedMask:
    size, counts = mask["size"], mask["counts"]
    if not isinstance(size, list | tuple) or not isinstance(counts, list | tuple | str | bytes):
        return _flawed(WRONG_TYPE, _shortly(mask))
    if list(size) != [height, width]:
        turned = " (width and height are exchanged)" * (list(size) == [width, height])
        image = f"{width}x{height}"
        return _flawed(OTHER_SIZE, f"size {_shortly(size)} for an image of {image} pixels{turned}")
    lengths = decompressed(counts) if isinstance(counts, str | bytes) else _numbers_of(counts)
    whole = lengths is not None and lengths.ndim == 1 and (lengths % 1 == 0).all()
    if not whole or (lengths < 0).any():
        return _flawed(DAMAGED, f"counts {_shortly(counts)}")
    if lengths.sum() != height * width:
        total = f"{int(lengths.sum())} instead of {height * width}"
        return _flawed(WRONG_SUM, f"counts that sum to {total}")
    if not lengths[1::2].any():
        return _flawed(NO_PIXEL, f"counts {_shortly(counts)}")
    plain = {"size": [height, width], "counts": lengths.astype(np.int64).tolist()}
    packed = mask_utils.frPyObjects(plain, height, width)
    return CheckedMask({"size": [height, width], "counts": packed["counts"].decode("ascii")})


def decompressed(counts: str | bytes) -> np.ndarray | None:
    """The run lengths ``(N,)`` of COCO's compressed text; None if it is damaged.

    pycocotools reads on behind the end of such a text, and gives a mask of what it finds there.
    A number is written in groups of five bits from the lowest up, with a sixth that says that more
    follow, as characters from "0" on; from the fourth run on, it is the difference to the run
    before the last.
    """
    try:
        raw = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError:
        return None
    codes = np.frombuffer(raw, np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 6:  # more bits than any image has pixels
        return None
    places = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    numbers = np.add.reduceat((codes & 31) << (5 * places), starts)
    negative = (codes[ends] & 16) != 0
    numbers -= negative * (1 << (5 * (places[ends] + 1)))
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def extent_of(usable: Segmentation) -> tuple[float, float, float, float]:
    """The box ``(x0, y0, x1, y1)`` around a mask, in pixels."""
    if isinstance(usable, dict):
        x, y, width, height = mask_utils.toBbox(usable).tolist()
        return x, y, x + width, y + height
    points = np.concatenate(usable).reshape(-1, 2)
    return (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())


def run_lengths(usable: Segmentation, height: int, width: int) -> dict[str, Any]:
    """COCO's compressed form of a mask of `check_mask`, as pycocotools takes it."""
    if isinstance(usable, dict):
        return usable
    return mask_utils.merge(mask_utils.frPyObjects(usable, height, width))


def encoded_mask(segmentation: Any, height: int, width: int) -> dict[str, Any] | None:
    """COCO's compressed run-length form of polygons or of a run-length mask in any form.

    Args:
        segmentation: as it stands in a file.
        height, width: of the image in pixels.

    Returns:
        what `pycocotools.mask` takes; None if the segmentation is missing, or is no mask of an
        image of this size. A mask outside of its image, or without area, is one without pixels.
    """
    checked = check_mask(segmentation, height, width)
    if checked.usable is not None:
        return run_lengths(checked.usable, height, width)
    if checked.flaws and {flaw for flaw, _ in checked.flaws} <= {OUTSIDE, NO_PIXEL}:
        nothing = {"size": [height, width], "counts": [height * width]}
        return mask_utils.frPyObjects(nothing, height, width)
    return None


class MaskChecker:
    """Reads the masks of a file one by one, and counts what is wrong with them.

    A mask that is damaged is an error, or left out if `invalid_boxes` is "skip": its object then
    has a box only.
    """

    def __init__(self, annotation_file: str, invalid_boxes: str) -> None:
        self.annotation_file = annotation_file
        self.skip_invalid = invalid_boxes == "skip"
        self.cases: dict[MaskFlaw, list[str]] = {}
        self.found = 0
        self.without: dict[str, int] = {}  # objects without a mask, by image

    def read(self, annotation: dict[str, Any], record: dict[str, Any]) -> Segmentation | None:
        """The mask of an object; None: it has none.

        Args:
            record: of its image, with `file_name`, `height` and `width`.

        Raises:
            DataError: if it is damaged, and of the wrong type or not to be left out.
        """
        checked = check_mask(annotation.get("segmentation"), record["height"], record["width"])
        where = f"annotation {annotation.get('id')!r} of image {record['file_name']}"
        for flaw, says in checked.flaws:
            if flaw.stops or not (self.skip_invalid or flaw.read_as):
                remedy = flaw.remedy
                if not flaw.stops:
                    remedy += ", or set data.invalid_boxes=skip to leave such masks out"
                raise DataError(
                    f"{where} in {self.annotation_file} has a mask that cannot be used "
                    f"({flaw.what}: {says}): {remedy}."
                )
            self.cases.setdefault(flaw, []).append(f"{where}, {says}")
        if checked.usable is None:
            name = record["file_name"]
            self.without[name] = self.without.get(name, 0) + 1
        else:
            self.found += 1
        return checked.usable

    def report(self) -> None:
        """Logs at most one line per kind of flaw, and one about objects without a mask."""
        for flaw, cases in self.cases.items():
            done = flaw.read_as or f"left out ({flaw.remedy})"
            logger.warning(
                "%s: %s: %d (the first: %s); %s.",
                *(self.annotation_file, flaw.what, len(cases), cases[0], done),
            )
        if not self.found:
            logger.warning(
                "%s has no masks: what learns masks is not trained on it, and nothing is pasted.",
                self.annotation_file,
            )
        elif self.without:
            logger.warning(
                "%s: %d objects in %d images have no mask (the first: %s): the masks of these "
                "images are not trained, their boxes are.",
                self.annotation_file,
                *(sum(self.without.values()), len(self.without), next(iter(self.without))),
            )
