"""COCO-format annotations as Detectron2 dataset dicts, checked before the first image is read.

Detectron2's own `load_coco_json` is not used: it drops boxes whose polygon is invalid, fails with
asserts, and keeps polygons in memory that box detection never looks at. What comes out is the same
format and the same metadata. LVIS and Objects365 have COCO's format with ways of their own.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any
from urllib.parse import urlparse

from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.structures import BoxMode

from co_detr.data.coco_classes import class_names, register_categories, require_ids
from co_detr.data.coco_file import (
    Entry,
    is_box,
    is_id,
    is_number,
    locate_files,
    read_coco,
    shortened,
)
from co_detr.data.segmentation import MaskChecker
from co_detr.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

# Annotation tools round to whole pixels: less than this outside the image is not worth a warning.
ROUNDING_PIXELS = 1.0


def load_coco(
    annotation_file: str,
    image_root: str,
    num_classes: int | None = None,
    invalid_boxes: str = "error",
    image_path: Callable[[dict[str, Any]], str] | None = None,
    partial_classes: bool = False,
    with_masks: bool = False,
    repeat_threshold: float = 0.0,
    score_weights: bool = False,
) -> list[dict[str, Any]]:
    """Reads a COCO-format json and registers its classes under `dataset_name(annotation_file)`.

    Args:
        annotation_file: json with the lists `images`, `annotations` and `categories`, of which
            `read_coco` corrects what has only one meaning. Without annotations, as a test set is,
            it may also lack the categories.
        image_root: directory that the paths of the images are relative to.
        num_classes: what the model was built for; None: not checked.
        invalid_boxes: "error", or "skip" to leave out boxes that have no area inside the image.
        image_path: gives the path of an entry of `images`; None: its `file_name`. Both as
            `locate_files` understands them.
        partial_classes: let the file have fewer classes than `num_classes`, as a val set may have;
            `align_classes` then has to say which ones they are.
        with_masks: keep the masks of objects, for heads that learn masks; crowds keep none.
        repeat_threshold: images with a class that is in less than this share of all images are
            listed several times, see `repeat_rare_classes`; 0: every image once.
        score_weights: objects with a `score`, as pseudo-labels have it, weigh as much in training;
            others weigh 1.

    Returns:
        One dict per image (images without boxes included), ordered by image id: `file_name`,
        `height`, `width`, `image_id`, and `annotations` with `bbox` (x, y, w, h in pixels),
        `bbox_mode`, contiguous `category_id` and `iscrowd`, with masks also `segmentation` as of
        `co_detr.data.segmentation`, where there is one, and `weight` with `score_weights`. Boxes
        are clipped to the image.

    Raises:
        DataError: in one sentence that names the file, image or annotation and the remedy.
    """
    content = read_coco(annotation_file)
    images = content.images
    if image_path is not None:
        images = [image | {"file_name": image_path(image)} for image in images]
    if partial_classes and num_classes is not None and len(content.categories) < num_classes:
        num_classes = None
    contiguous_ids = register_categories(content, image_root, num_classes, partial_classes)
    records = _image_records(images, annotation_file, image_root)
    if not content.annotations:
        logger.warning("%s has no annotations: all its images count as empty.", annotation_file)
    boxes = BoxChecker(annotation_file, invalid_boxes)
    masks = MaskChecker(annotation_file, invalid_boxes)
    for annotation in content.annotations:
        where = f"annotation {annotation.get('id')!r} of {annotation_file}"
        missing = {"image_id", "category_id", "bbox"} - annotation.keys()
        if missing:
            raise DataError(f"{where} has no {' and no '.join(sorted(missing))}: add it.")
        image_id, category_id = annotation["image_id"], annotation["category_id"]
        record = records.get(image_id) if is_id(image_id) else None
        if record is None:
            raise DataError(
                f"{where} belongs to image id {image_id!r}, which is not in 'images' "
                f"({shortened(map(repr, records))}): add the image or remove the annotation."
            )
        if not is_id(category_id) or category_id not in contiguous_ids:
            raise DataError(
                f"{where} (image {record['file_name']}) has category_id {category_id!r}, which "
                f"is not in 'categories' ({shortened(map(repr, contiguous_ids))}): add the "
                "category or correct the id."
            )
        crowd = annotation.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise DataError(f"{where} has iscrowd {crowd!r}: write 0 or 1.")
        box = boxes.clip(annotation, record)
        if box is not None:
            kept = {
                "bbox": box,
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": contiguous_ids[category_id],
                "iscrowd": int(crowd),
            }
            if score_weights and not kept["iscrowd"]:
                kept["weight"] = _weight_of(annotation, where)
            if with_masks and not kept["iscrowd"]:
                mask = masks.read(annotation, record)
                if mask is not None:
                    kept["segmentation"] = mask
            record["annotations"].append(kept)
    boxes.report()
    if with_masks:
        masks.report()
    dataset = [records[image_id] for image_id in sorted(records)]
    count = sum(len(record["annotations"]) for record in dataset)
    logger.info("%s: %d images, %d boxes.", annotation_file, len(dataset), count)
    if score_weights:
        _log_weights(dataset)
    if repeat_threshold:
        return repeat_rare_classes(dataset, repeat_threshold, class_names(annotation_file))
    return dataset


def _weight_of(annotation: dict[str, Any], where: str) -> float:
    score = annotation.get("score", 1.0)
    if not is_number(score) or not 0 < score <= 1:
        raise DataError(
            f"{where} has the score {score!r}, by which its loss cannot be weighed: write a number "
            "above 0 and up to 1, or set dataloader.train.dataset.score_weights=false."
        )
    return float(score)


def _log_weights(dataset: Sequence[dict[str, Any]]) -> None:
    objects = [entry for record in dataset for entry in record["annotations"]]
    weights = [entry["weight"] for entry in objects if "weight" in entry]  # crowds have none
    lower = [weight for weight in weights if weight < 1]
    if not lower:
        logger.warning(
            "Losses are to be weighed by scores (score_weights), but no box has a score below 1."
        )
        return
    logger.info(
        "Losses are weighed by scores: %d of %d boxes have one below 1, %.2f on average.",
        *(len(lower), len(weights), sum(lower) / len(lower)),
    )


def load_lvis(
    annotation_file: str,
    image_root: str,
    num_classes: int | None = None,
    invalid_boxes: str = "error",
    repeat_threshold: float = 0.0,
    with_masks: bool = False,
    score_weights: bool = False,
) -> list[dict[str, Any]]:
    """Reads an LVIS v1 json, of 1203 classes; as `load_coco` with another way to the images.

    Args:
        image_root: directory that holds COCO's `train2017` and `val2017`. LVIS says where each
            image is by its address (`coco_url`): its val set has images of both directories.

    Raises:
        DataError: as `load_coco`; or if an image has no `coco_url`.
    """
    return load_coco(
        *(annotation_file, image_root, num_classes, invalid_boxes),
        image_path=image_path_of(load_lvis, annotation_file),
        with_masks=with_masks,
        repeat_threshold=repeat_threshold,
        score_weights=score_weights,
    )


def repeat_rare_classes(
    records: list[dict[str, Any]], threshold: float, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Lists an image r times, r = ceil(max over its classes of max(1, sqrt(threshold / f))).

    f is the share of images that show the class. Logs what becomes of the rarest class. Source:
    LVIS (Gupta et al., 2019) appendix B.2, rounded up as mmdet's ``ClassBalancedDataset`` does it.

    Args:
        names: of the classes.

    Raises:
        ConfigError: if the threshold is not from 0 to 1.
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(
            f"dataloader.train.dataset.repeat_threshold={threshold} must be a share of the images, "
            "from 0 (none is repeated) to 1."
        )
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(records, threshold)
    times = [math.ceil(factor) for factor in factors.tolist()]
    seen: Counter[int] = Counter()
    repeated: Counter[int] = Counter()
    for record, count in zip(records, times, strict=True):
        classes = {annotation["category_id"] for annotation in record["annotations"]}
        seen.update(classes)
        repeated.update(dict.fromkeys(classes, count))
    if seen:
        rarest = min(seen, key=lambda number: (seen[number], number))
        logger.info(
            "Images of rare classes are repeated (repeat_threshold=%g): %d instead of %d; %r, the "
            "rarest class, is in %d instead of %d (%.1f times as often).",
            *(threshold, sum(times), len(records), names[rarest]),
            *(repeated[rarest], seen[rarest], repeated[rarest] / seen[rarest]),
        )
    return [record for record, count in zip(records, times, strict=True) for _ in range(count)]


def _path_of_url(annotation_file: str, image: dict[str, Any]) -> str:
    """.../train2017/000000391895.jpg -> train2017/000000391895.jpg"""
    url = image.get("coco_url")
    parts = urlparse(url).path.split("/") if isinstance(url, str) else []
    if len(parts) < 2:
        raise DataError(
            f"image {image.get('id')} of {annotation_file} has no coco_url: use the annotation "
            "files of LVIS v1, or a config for COCO-format data."
        )
    return "/".join(parts[-2:])


def load_objects365(
    annotation_file: str,
    image_root: str,
    num_classes: int | None = None,
    invalid_boxes: str = "error",
    repeat_threshold: float = 0.0,
    with_masks: bool = False,
    score_weights: bool = False,
) -> list[dict[str, Any]]:
    """Reads Objects365 v2, `zhiyuan_objv2_train.json` or `.._val.json`; as `load_coco`.

    Args:
        image_root: directory that holds the unpacked archives `patch0`, `patch1`, ... The files
            name their images `images/v1/patch8/NAME.jpg`, of which only the last two parts are in
            the archives.
    """
    return load_coco(
        *(annotation_file, image_root, num_classes, invalid_boxes),
        image_path=image_path_of(load_objects365, annotation_file),
        with_masks=with_masks,
        repeat_threshold=repeat_threshold,
        score_weights=score_weights,
    )


def _path_in_archives(annotation_file: str, image: dict[str, Any]) -> str:
    name = image.get("file_name")
    if not isinstance(name, str):
        raise DataError(
            f"image {image.get('id')} of {annotation_file} has the file_name {name!r}: write text."
        )
    return "/".join(name.split("/")[-2:])


# How each loader finds the image of an entry; None: by its `file_name`.
_WAYS: dict[Callable[..., Any], Callable[[str, dict[str, Any]], str] | None] = {
    load_coco: None,
    load_lvis: _path_of_url,
    load_objects365: _path_in_archives,
}


def reads_coco_format(loader: Any) -> bool:
    """Whether it is one of the loaders of this module."""
    return callable(loader) and loader in _WAYS


def image_path_of(
    loader: Callable[..., Any], annotation_file: str
) -> Callable[[dict[str, Any]], str] | None:
    """The `image_path` that a loader of this module gives `load_coco` for a file.

    It raises a DataError for an entry that does not say where its image is.
    """
    way = _WAYS[loader]
    return None if way is None else partial(way, annotation_file)


def _image_records(
    images: list[Entry], annotation_file: str, image_root: str
) -> dict[int | str, dict[str, Any]]:
    if not images:
        raise DataError(f"'images' of {annotation_file} is empty: the data set has no image.")
    if not os.path.isdir(image_root):
        raise DataError(
            f"image directory {image_root} does not exist: set data.train_images and "
            f"data.val_images to the directories of the images of {annotation_file}."
        )
    for image in images:
        missing = {"id", "file_name", "height", "width"} - image.keys()
        if missing:
            raise DataError(
                f"image {image.get('file_name', image.get('id'))} of {annotation_file} has no "
                f"{' and no '.join(sorted(missing))}: add it."
            )
        if not isinstance(image["file_name"], str):
            raise DataError(
                f"image id {image['id']!r} of {annotation_file} has the file_name "
                f"{image['file_name']!r}: write text."
            )
    require_ids([image["id"] for image in images], "images", annotation_file)
    located = locate_files((image["file_name"] for image in images), image_root)
    if located.moved:
        name = located.moved[0]
        logger.warning(
            "%s: %d images are not where it says, and were found elsewhere; the first is %r, read "
            "from %s.",
            *(annotation_file, len(located.moved), name),
            os.path.join(image_root, located.paths[name]),
        )
    records: dict[int | str, dict[str, Any]] = {}
    for image in images:
        name = image["file_name"]
        path = os.path.join(image_root, located.paths.get(name, name))
        if name not in located.paths:
            hint = located.hint()
            raise DataError(
                f"image {path} (id {image['id']!r} of {annotation_file}) does not exist: add the "
                "file, or set data.train_images or data.val_images to the right directory"
                f"{f' ({hint})' * bool(hint)}."
            )
        if image["id"] in records:
            raise DataError(
                f"image id {image['id']!r} ({path}) occurs twice in {annotation_file}: make the "
                "ids unique."
            )
        size = (image["width"], image["height"])
        if not all(is_number(side) and side > 0 for side in size):
            raise DataError(
                f"image {path} has width {size[0]!r} and height {size[1]!r} in "
                f"{annotation_file}: write its true size."
            )
        records[image["id"]] = {
            "file_name": path,
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [],
        }
    return records


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
