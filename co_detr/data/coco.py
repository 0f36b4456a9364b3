"""COCO-format annotations as Detectron2 dataset dicts, checked before the first image is read.

Detectron2's own `load_coco_json` is not used: it drops boxes whose polygon is invalid, fails with
asserts, and keeps polygons in memory that box detection never looks at. What comes out is the same
format and the same metadata.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from co_detr.data.boxes import BoxChecker
from co_detr.errors import DataError

logger = logging.getLogger(__name__)


def load_coco(
    annotation_file: str,
    image_root: str,
    num_classes: int | None = None,
    invalid_boxes: str = "error",
    image_path: Callable[[dict[str, Any]], str] | None = None,
) -> list[dict[str, Any]]:
    """Reads a COCO-format json and registers its classes under `dataset_name(annotation_file)`.

    Args:
        annotation_file: json with the lists `images`, `annotations` and `categories`.
        image_root: directory that the paths of the images are relative to.
        num_classes: what the model was built for; None: not checked.
        invalid_boxes: "error", or "skip" to leave out boxes that have no area inside the image.
        image_path: gives the path of an entry of `images`; None: its `file_name`.

    Returns:
        One dict per image (images without boxes included), ordered by image id: `file_name`,
        `height`, `width`, `image_id`, and `annotations` with `bbox` (x, y, w, h in pixels),
        `bbox_mode`, contiguous `category_id` and `iscrowd`. Boxes are clipped to the image.

    Raises:
        DataError: in one sentence that names the file, image or annotation and the mend.
    """
    content = _read_json(annotation_file)
    if image_path is not None:
        for image in content["images"]:
            image["file_name"] = image_path(image)
    contiguous_ids = _register_categories(content, annotation_file, image_root, num_classes)
    records = _image_records(content["images"], annotation_file, image_root)
    boxes = BoxChecker(annotation_file, invalid_boxes)
    for annotation in content["annotations"]:
        where = f"annotation {annotation.get('id')} of {annotation_file}"
        missing = {"image_id", "category_id", "bbox"} - annotation.keys()
        if missing:
            raise DataError(f"{where} has no {' and no '.join(sorted(missing))}: add it.")
        record = records.get(annotation["image_id"])
        if record is None:
            raise DataError(
                f"{where} belongs to image id {annotation['image_id']}, which is not in 'images': "
                "add the image or remove the annotation."
            )
        category_id = annotation["category_id"]
        if category_id not in contiguous_ids:
            raise DataError(
                f"{where} (image {record['file_name']}) has category_id {category_id}, which is "
                f"not in 'categories' ({_shortened(contiguous_ids)}): add the category or correct "
                "the id."
            )
        box = boxes.clip(annotation, record)
        if box is not None:
            record["annotations"].append(
                {
                    "bbox": box,
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": contiguous_ids[category_id],
                    "iscrowd": int(annotation.get("iscrowd", 0)),
                }
            )
    boxes.report()
    dataset = [records[image_id] for image_id in sorted(records)]
    count = sum(len(record["annotations"]) for record in dataset)
    logger.info("%s: %d images, %d boxes.", annotation_file, len(dataset), count)
    return dataset


def dataset_name(annotation_file: str) -> str:
    """The name under which Detectron2's `MetadataCatalog` knows the file."""
    return f"coco:{os.path.abspath(annotation_file)}"


def require_same_classes(first_file: str, second_file: str) -> None:
    """Raises a DataError if two loaded files do not name the same classes in the same order."""
    first = MetadataCatalog.get(dataset_name(first_file)).thing_classes
    second = MetadataCatalog.get(dataset_name(second_file)).thing_classes
    if first != second:
        raise DataError(
            f"{first_file} has the categories ({_shortened(first)}) but {second_file} has "
            f"({_shortened(second)}): give both files the same categories with the same ids."
        )


def _read_json(annotation_file: str) -> dict[str, list[dict[str, Any]]]:
    if not os.path.isfile(annotation_file):
        raise DataError(
            f"annotation file {annotation_file} does not exist: set data.train and data.val to "
            "your COCO-format json files."
        )
    try:
        with open(annotation_file, encoding="utf-8") as file:
            content = json.load(file)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(
            f"{annotation_file} is not valid json ({error}): write it again or fetch it again."
        ) from error
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(
                f"{annotation_file} is not in COCO format: it has no list '{key}' of objects; it "
                "needs 'images', 'annotations' and 'categories'."
            )
    return content


def _register_categories(
    content: dict[str, list[dict[str, Any]]],
    annotation_file: str,
    image_root: str,
    num_classes: int | None,
) -> dict[int, int]:
    """Fills the metadata and returns category id -> contiguous id."""
    for category in content["categories"]:
        if "id" not in category or "name" not in category:
            raise DataError(f"category {category} of {annotation_file} needs an id and a name.")
    categories = sorted(content["categories"], key=lambda category: category["id"])
    names = [str(category["name"]) for category in categories]
    contiguous_ids = {category["id"]: i for i, category in enumerate(categories)}
    if len(contiguous_ids) != len(categories):
        raise DataError(f"'categories' of {annotation_file} repeats an id: make the ids unique.")
    if num_classes is not None and len(names) != num_classes:
        raise DataError(
            f"{annotation_file} has {len(names)} categories ({_shortened(names)}) but the model "
            f"has {num_classes}: set model.num_classes={len(names)}."
        )
    name = dataset_name(annotation_file)
    # A file can be loaded again with other content (in one process, for example in notebooks).
    if name in MetadataCatalog.list():
        MetadataCatalog.remove(name)
    MetadataCatalog.get(name).set(
        json_file=annotation_file,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=names,
        thing_dataset_id_to_contiguous_id=contiguous_ids,
    )
    return contiguous_ids


def _image_records(
    images: list[dict[str, Any]], annotation_file: str, image_root: str
) -> dict[int, dict[str, Any]]:
    if not images:
        raise DataError(f"'images' of {annotation_file} is empty: the data set has no image.")
    if not os.path.isdir(image_root):
        raise DataError(
            f"image directory {image_root} does not exist: set data.train_images and "
            f"data.val_images to the directories of the images of {annotation_file}."
        )
    present = _files(image_root, {os.path.dirname(image.get("file_name", "")) for image in images})
    records: dict[int, dict[str, Any]] = {}
    for image in images:
        missing = {"id", "file_name", "height", "width"} - image.keys()
        if missing:
            raise DataError(
                f"image {image.get('file_name', image.get('id'))} of {annotation_file} has no "
                f"{' and no '.join(sorted(missing))}: add it."
            )
        path = os.path.join(image_root, image["file_name"])
        if image["file_name"] not in present and not os.path.isfile(path):
            raise DataError(
                f"image {path} (id {image['id']} of {annotation_file}) does not exist: add the "
                "file, or set data.train_images or data.val_images to the right directory."
            )
        if image["id"] in records:
            raise DataError(
                f"image id {image['id']} ({path}) occurs twice in {annotation_file}: make the "
                "ids unique."
            )
        if not (image["height"] > 0 and image["width"] > 0):
            raise DataError(
                f"image {path} has width {image['width']} and height {image['height']} in "
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


def _shortened(values: Any, limit: int = 10) -> str:
    texts = [str(value) for value in values]
    more = [f"and {len(texts) - limit} more"] if len(texts) > limit else []
    return ", ".join(texts[:limit] + more)


def _files(root: str, directories: set[str]) -> set[str]:
    """Paths below `root` of everything in `directories`.

    One listing per directory instead of one look-up per image: large sets often lie on network
    disks.
    """
    present = set()
    for directory in directories:
        path = os.path.join(root, directory)
        if os.path.isdir(path):
            present |= {os.path.join(directory, name) for name in os.listdir(path)}
    return present
