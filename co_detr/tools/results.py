"""Files of detections, as an evaluation and predict.py write them: read, checked, in one form.

An evaluation writes COCO's result format, a list whose ids are those of the evaluated file. The
json of predict.py is an annotation file with scores: its images are known by their file names, and
its classes by theirs. Both become entries with the ids of one `Reference`.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from co_detr.data.coco_file import (
    CocoFile,
    Entry,
    display_names,
    is_box,
    is_id,
    is_number,
    read_coco,
    read_json,
    shortened,
)
from co_detr.errors import ConfigError, DataError

ImageId = int | str
_KEPT = ("bbox", "score", "segmentation", "mask_score")  # of an entry of predict.py


@dataclass(frozen=True)
class Reference:
    """Images and classes that ids of detections mean.

    Attributes:
        path: of the file that has them.
        images: entries by their ids.
        classes: category id -> name.
    """

    path: str
    images: dict[ImageId, Entry]
    classes: dict[int | str, str]

    @classmethod
    def of(cls, content: CocoFile) -> Reference:
        """Of an annotation file.

        Raises:
            DataError: if an id is missing or there twice, or a category has no name.
        """
        for key in ("images", "categories"):
            times = Counter(entry.get("id") for entry in getattr(content, key))
            for value, number in times.items():
                if number > 1 or not is_id(value):
                    raise DataError(
                        f"'{key}' of {content.path} has the id {value!r}, which is missing, no id, "
                        "or there twice: give each its own."
                    )
        for category in content.categories:
            if "name" not in category:
                raise DataError(f"category {category} of {content.path} has no name: add it.")
        images = {image["id"]: image for image in content.images}
        return cls(content.path, images, display_names(content.categories))


@dataclass(frozen=True)
class DetectionFile:
    """Detections of one model.

    Attributes:
        path: of the file.
        entries: in COCO's result format, in the order of the file.
        images: that the model has looked at: those that the file lists, or else those with a
            detection.
    """

    path: str
    entries: list[Entry]
    images: frozenset[ImageId]


def read_detections(
    paths: Sequence[str], reference: Reference | None
) -> tuple[list[DetectionFile], Reference | None]:
    """Reads files of detections.

    Args:
        paths: of either form.
        reference: of the data; None: the first of the files that lists images is taken.

    Returns:
        The files, with ids of the reference; and that, None if no file has one.

    Raises:
        DataError: in one sentence that names the file and the detection.
    """
    contents = [read_json(path) for path in paths]
    if reference is None:
        listing = [p for p, content in zip(paths, contents, strict=True) if _lists_images(content)]
        reference = Reference.of(read_coco(listing[0])) if listing else None
    files = []
    for path, content in zip(paths, contents, strict=True):
        if _lists_images(content) and reference is not None:
            files.append(_of_annotation_file(path, content, reference))
        elif isinstance(content, list):
            entries = [_checked(path, n, entry, reference) for n, entry in enumerate(content)]
            images = frozenset(entry["image_id"] for entry in entries)
            files.append(DetectionFile(path, entries, images))
        else:
            raise DataError(
                f"{path} is no file of detections: name the coco_instances_results.json of an "
                "evaluation, or the predictions.json of predict.py."
            )
    return files, reference


def require_other_file(output: Path, inputs: Sequence[str]) -> None:
    """Raises a ConfigError if a result would replace a file that it is made of."""
    for path in inputs:
        if output.exists() and os.path.exists(path) and output.samefile(path):
            raise ConfigError(f"{output} would replace its own input: choose another --output.")


def _lists_images(content: Any) -> bool:
    return isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys()


def _checked(path: str, number: int, entry: Any, reference: Reference | None) -> Entry:
    where = f"detection {number} of {path}"
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {entry!r}: it needs image_id, category_id, bbox and score.")
    missing = [key for key in ("image_id", "category_id", "bbox", "score") if key not in entry]
    if missing:
        advice = "; annotations have none, name detections" if missing == ["score"] else ""
        raise DataError(f"{where} has no {' and no '.join(missing)}: write it again{advice}.")
    image, category, box = entry["image_id"], entry["category_id"], entry["bbox"]
    if not is_box(box) or min(box[2:]) < 0:
        raise DataError(
            f"{where} (image_id {image!r}) has the bbox {box!r}, which is not four finite numbers "
            "(x, y, width, height): leave it out, or predict again."
        )
    for key in ("score", "mask_score"):
        value = entry.get(key, 0)
        if not (is_number(value) and 0 <= value <= 1):
            raise DataError(f"{where} has the {key} {value!r}: write a number from 0 to 1.")
    if not (is_id(image) and is_id(category)):
        raise DataError(f"{where} has image_id {image!r} and category_id {category!r}: no ids.")
    if reference is not None:
        if image not in reference.images:
            raise DataError(
                f"{where} is of image_id {image!r}, which {reference.path} does not have: name the "
                "annotation file that was evaluated."
            )
        if category not in reference.classes:
            raise DataError(
                f"{where} is of category_id {category!r}, which {reference.path} does not have "
                f"({shortened(map(repr, reference.classes))}): name the annotation file that was "
                "evaluated, with its categories."
            )
    return entry


def _of_annotation_file(path: str, content: Entry, reference: Reference) -> DetectionFile:
    own = Reference.of(CocoFile(path, content["images"], [], content["categories"]))
    images = _matched_images(own, reference)
    ids = {name: key for key, name in reference.classes.items()}
    unknown = [name for name in own.classes.values() if name not in ids]
    if unknown:
        raise DataError(
            f"{path} has the classes {shortened(unknown)}, which {reference.path} does not have "
            f"({shortened(ids)}): classes have to have the same names."
        )
    entries = []
    for number, entry in enumerate(content["annotations"]):
        entry = _checked(path, number, entry, own)
        kept = {
            key: entry[key]
            for key in ("bbox", "score", "segmentation", "mask_score")
            if key in entry
        }
        category = ids[own.classes[entry["category_id"]]]
        entries.append({"image_id": images[entry["image_id"]], "category_id": category} | kept)
    return DetectionFile(path, entries, frozenset(images.values()))


def _matched_images(own: Reference, reference: Reference) -> dict[ImageId, ImageId]:
    """Ids of one file -> ids of the other, by the whole file name, or its last part if that is
    there once."""
    whole = {str(image.get("file_name")): key for key, image in reference.images.items()}
    last: dict[str, list[ImageId]] = defaultdict(list)
    for name, key in whole.items():
        last[os.path.basename(name)].append(key)
    found = {}
    for key, image in own.images.items():
        name = str(image.get("file_name"))
        candidates = [whole[name]] if name in whole else last[os.path.basename(name)]
        if len(candidates) != 1:
            many = "more than one image" if candidates else "no image"
            raise DataError(
                f"{own.path} has the image {name!r}, and {reference.path} has {many} of that name: "
                "predict the images of that file."
            )
        found[key] = candidates[0]
    return found


def with_score(entry: Entry, score: float) -> Entry:
    """The detection with another score; that of its mask, if it has one, changes as much."""
    if score == entry["score"]:
        return entry
    changed = entry | {"score": score}
    if "mask_score" in entry and entry["score"] > 0:
        changed["mask_score"] = min(1.0, entry["mask_score"] * score / entry["score"])
    return changed


def by_image(entries: Sequence[Entry]) -> Mapping[ImageId, list[Entry]]:
    """Entries of each image, in their order; [] for all others."""
    found: dict[ImageId, list[Entry]] = defaultdict(list)
    for entry in entries:
        found[entry["image_id"]].append(entry)
    return found


def corners(entries: Sequence[Entry]) -> np.ndarray:
    """Boxes ``(N, 4)`` absolute xyxy, float64."""
    boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes
