"""Looks a data set over before it is used, so that no defect shows as an AP of 0 hours later.

`preflight` only reports; what a warning calls "left out" or "clipped" is done by `load_coco`, and
what it calls "by name" by `align_classes`. Image files are all looked up, and some or all decoded
as in training.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from co_detr.data.coco import require_choice
from co_detr.data.coco_file import locate_files, read_coco
from co_detr.data.images import ImageError, ImageReader, Pixels
from co_detr.data.preflight_annotations import (
    PreflightReport,
    SplitReport,
    check_annotations,
    check_masks,
)
from co_detr.data.preflight_boxes import Limits, check_boxes, count_objects
from co_detr.errors import ConfigError

# Of an image with more than 8 bits, so many values are looked at, evenly spread.
_LOOKED_AT = 100_000
# Of a set with more objects, so many masks are looked at: the 1.3 million of LVIS take minutes.
MOST_MASKS = 200_000
# Below this share of the range, what cameras of 14 bits leave in files of 16 is a small part, too.
_SMALL_PART = 0.3
# Such images keep a few pixels of their short side when they are resized.
_THIN = 100


@dataclass(frozen=True)
class PreflightSettings:
    """The node data.preflight.

    Attributes:
        images: "all" decodes every image and looks at every mask, "sample" at some of each split,
            "off" decodes none. Whether the files exist is looked up for all of them in any case.
        sample_size: how many images of each split "sample" decodes.
        suspicion: "error" or "warning": what it is when boxes look, over the whole file, as if
            they were no (x, y, w, h) of these images.
    """

    images: str = "sample"
    sample_size: int = 64
    suspicion: str = "error"

    def __post_init__(self) -> None:
        require_choice("data.preflight.images", self.images, ("all", "sample", "off"))
        require_choice("data.preflight.suspicion", self.suspicion, ("error", "warning"))
        if not (isinstance(self.sample_size, int) and self.sample_size >= 1):
            raise ConfigError(
                f"data.preflight.sample_size={self.sample_size} must be a whole number of at "
                "least 1; data.preflight.images=off decodes no image."
            )


@dataclass(frozen=True)
class SplitFiles:
    """What data.train and data.train_images (or those of val) name.

    Attributes:
        masks: whether masks are read, and so have to be right.
        image_path: as that of `load_coco`; None: the `file_name` of an entry.
    """

    split: str
    annotations: str
    images: str
    masks: bool = False
    image_path: Callable[[dict[str, Any]], str] | None = None


def preflight(
    splits: list[SplitFiles],
    settings: PreflightSettings | None = None,
    invalid_boxes: str = "skip",
    limits: Limits | None = None,
    unlabeled: bool = False,
    reader: ImageReader | None = None,
) -> PreflightReport:
    """Inspects "train" and "val", or one of them.

    Args:
        invalid_boxes: as in `load_coco`; decides whether boxes without area are errors.
        limits: of the model and the evaluation, which the objects of each image are compared with.
        unlabeled: whether a file without annotations is that of a test set, and no error.
        reader: opens the images; None: one with its defaults.

    Raises:
        DataError: if an annotation file cannot be read at all, or an image has no path. Everything
            else is in the report; see `PreflightReport.raise_on_errors`.
    """
    settings = settings or PreflightSettings()
    reader = reader or ImageReader()
    require_choice("data.invalid_boxes", invalid_boxes, ("error", "skip"))
    reports: list[SplitReport] = []
    paths: list[set[str]] = []
    deep: list[DeepImage] = []
    for files in splits:
        report = SplitReport(files.split, files.annotations, suspicion=settings.suspicion)
        # Kept, as the file is loaded next.
        content = read_coco(files.annotations, keep=True)
        if files.image_path is not None:
            named = [image | {"file_name": files.image_path(image)} for image in content.images]
            content = replace(content, images=named)
        images, annotations = check_annotations(report, content, unlabeled)
        if annotations is not None:
            good = check_boxes(report, annotations, images, invalid_boxes)
            count_objects(report, good, images, limits or Limits())
            if files.masks:
                most = None if settings.images == "all" else MOST_MASKS
                check_masks(report, good, images, invalid_boxes, most)
        count = {"all": None, "sample": settings.sample_size, "off": 0}[settings.images]
        checked = check_images(report, list(images.values()), files.images, count, reader)
        deep += checked.deep
        reports.append(report)
        root = os.path.realpath(files.images)
        paths.append(
            {os.path.normpath(os.path.join(root, image["file_name"])) for image in checked.found}
        )
    check_values(reports[0], deep)
    if len(reports) == 2:
        train, val = reports
        _compare_classes(train, val)
        val.add(
            "warning",
            sorted(paths[0] & paths[1]),
            "images that are in train, too",
            "AP on them says little about new images",
        )
    return PreflightReport(reports)


def _compare_classes(train: SplitReport, val: SplitReport) -> None:
    known, named = train.class_names, val.class_names
    unknown = [name for name in named if name not in known]
    similar = {_plain(name): name for name in known}
    near = [similar[_plain(name)] for name in unknown if _plain(name) in similar]
    cause = f" (train has {near[0]!r}: upper and lower case and spaces count)" if near else ""
    val.add(
        "error",
        list(map(repr, unknown)) if near else unknown,
        f"categories that train lacks (it has {', '.join(known[:8]) or 'none'})",
        f"give both files the same names, or remove the categories and their boxes from val{cause}",
    )
    absent = [name for name in known if name not in named]
    val.add(
        "warning", absent, "categories of train that val lacks", "they are learned, not evaluated"
    )
    if unknown:
        return
    ids = {name: key for name, (key, _) in zip(known, train.categories, strict=True)}
    moved = [
        f"{name}, id {key} here and {ids[name]} in train"
        for name, (key, _) in zip(named, val.categories, strict=True)
        if ids[name] != key
    ]
    val.add("warning", moved, "categories with another id than in train", "matched by name")


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())


@dataclass(frozen=True)
class DeepImage:
    """What is known about the values of an image with more than 8 bits per channel.

    Attributes:
        low, high: all but a thousandth at either end lie between them.
        limits: what becomes black and white; None: this is not known.
        is_stated: whether the limits are data.value_range, not those of the type.
        outside: share of the values that are cut off, from 0 to 1.
    """

    path: str
    low: float
    high: float
    limits: tuple[float, float] | None
    is_stated: bool
    outside: float


@dataclass(frozen=True)
class _Decoded:
    """An image with what is wrong with it; None and "" stand for nothing."""

    path: str
    error: ImageError | None = None
    other_size: str = ""
    deep: DeepImage | None = None


@dataclass(frozen=True)
class CheckedImages:
    """What `check_images` found.

    Attributes:
        found: entries whose file is there; their `file_name` is where it is, relative to the root.
        deep: those of the decoded images that have more than 8 bits per channel.
    """

    found: list[dict[str, Any]]
    deep: list[DeepImage]


def check_images(
    report: SplitReport,
    images: list[dict[str, Any]],
    image_root: str,
    count: int | None,
    reader: ImageReader,
) -> CheckedImages:
    """Looks every file up, and decodes `count` of those there are (None: all, with a bar).

    Args:
        images: entries of `images` with a `file_name` of text and a `width` and `height`.
    """
    report.add(
        "warning",
        [
            f"{image['file_name']}, {image['width']}x{image['height']}"
            for image in images
            if max(image["width"], image["height"]) > _THIN * min(image["width"], image["height"])
        ],
        f"images that are more than {_THIN} times as long as wide",
        "resized, they are a few pixels wide: cut them into parts",
    )
    key = f"data.{report.split}_images"
    if not os.path.isdir(image_root):
        report.add(
            "error",
            [image_root],
            "image directory that does not exist",
            f"set {key} to the directory of the images",
        )
        return CheckedImages([], [])
    located = locate_files((image["file_name"] for image in images), image_root)
    report.add(
        "warning",
        [
            f"{name!r}, found at {os.path.join(image_root, located.paths[name])}"
            for name in located.moved
        ],
        "image files that are not where the json says",
        "read from where they were found",
    )
    hint = located.hint()
    report.add(
        "error",
        [os.path.join(image_root, name) for name in located.missing],
        "image files that do not exist",
        f"add the files, remove their entries, or set {key} to the right directory"
        f"{f' ({hint})' * bool(hint)}",
    )
    found = [
        image | {"file_name": located.paths[image["file_name"]]}
        for image in images
        if image["file_name"] in located.paths
    ]
    if count is None or count >= len(found):
        chosen = found
    else:
        # Always the same ones: the outcome of a run must not depend on luck.
        chosen = random.Random(0).sample(found, count)
    report.decoded = len(chosen)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda image: _decode(image, image_root, reader), chosen)
        bar = tqdm(
            results,
            f"decoding {report.split} images",
            len(chosen),
            disable=count is not None,
            leave=False,
        )
        decoded = list(bar)
    errors = [image.error for image in decoded if image.error is not None]
    for what, remedy in dict.fromkeys((error.what, error.remedy) for error in errors):
        cases = [
            f"{image.path} {image.error.says}"
            for image in decoded
            if image.error is not None and image.error.what == what
        ]
        report.add("error", cases, what, remedy)
    report.add(
        "error",
        [f"{image.path} is {image.other_size}" for image in decoded if image.other_size],
        "image files of another size than the json says",
        "write the true sizes (width x height), or remove a rotation from the EXIF data",
    )
    return CheckedImages(found, [image.deep for image in decoded if image.deep is not None])


def check_values(report: SplitReport, images: list[DeepImage]) -> None:
    """Says which values become black and white, and whether that fits the images of all splits."""
    unknown = [image for image in images if image.limits is None]
    report.add(
        "error",
        [_values_of(image) for image in unknown],
        "images of 32-bit or floating-point values without data.value_range",
        f"set data.value_range, to the same for all data; these images use {_span(unknown)}",
    )
    for limits in dict.fromkeys(image.limits for image in images if image.limits is not None):
        those = [image for image in images if image.limits == limits]
        stated = "data.value_range" if those[0].is_stated else "the range of their type"
        span = f"{limits[0]:g} to {limits[1]:g}"
        report.values.append(
            f"{len(those)} images have more than 8 bits: {span} ({stated}) becomes 0 to 255"
        )
        used = max(image.high for image in those) - min(image.low for image in those)
        cut_off = [image for image in those if image.outside > 0.5]
        report.add(
            "warning",
            [_values_of(image) for image in cut_off],
            f"images most of whose values lie outside {stated}, {span}",
            f"they become black or white: set data.value_range; these images use {_span(cut_off)}",
        )
        if used < _SMALL_PART * (limits[1] - limits[0]) and not cut_off:
            report.add(
                "warning",
                [_values_of(image) for image in those],
                f"images whose values use a small part of {stated}, {span}",
                f"the model sees little contrast: set data.value_range={_span(those)}, which is "
                "what they use, or the range of the camera",
            )


def _values_of(image: DeepImage) -> str:
    return f"{image.path}, {image.low:g} to {image.high:g}"


def _span(images: list[DeepImage]) -> str:
    if not images:
        return ""
    return f"[{min(image.low for image in images):g},{max(image.high for image in images):g}]"


def _decode(image: dict[str, Any], image_root: str, reader: ImageReader) -> _Decoded:
    path = os.path.join(image_root, image["file_name"])
    deep = None
    try:
        pixels = reader.decode(path)
        if pixels.is_deep:
            deep = _deep_image(path, pixels, reader)
        if deep is None or deep.limits is not None:
            reader.scale(pixels, f"image {path}")
    except ImageError as error:
        return _Decoded(path, error=error)
    if pixels.size != (image["width"], image["height"]):
        size = f"{pixels.size[0]}x{pixels.size[1]}"
        annotated = f"{image['width']}x{image['height']}"
        return _Decoded(path, other_size=f"{size}, not {annotated}", deep=deep)
    return _Decoded(path, deep=deep)


def _deep_image(path: str, pixels: Pixels, reader: ImageReader) -> DeepImage:
    values = pixels.values.reshape(-1)
    values = values[:: max(1, len(values) // _LOOKED_AT)]
    values = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    if not len(values):
        values = np.zeros(1)
    low, high = np.quantile(values, (0.001, 0.999), method="nearest").tolist()
    limits = reader.value_range or pixels.type_range
    outside = 0.0
    if limits is not None:
        outside = float(((values < limits[0]) | (values > limits[1])).mean())
    return DeepImage(path, low, high, limits, reader.value_range is not None, outside)
