"""COCO-format annotations as Detectron2 dataset dicts, checked before the first image is read.

Detectron2's own `load_coco_json` is not used: it drops boxes whose polygon is invalid, fails with
asserts, and keeps polygons in memory that box detection never looks at. What comes out is the same
format and the same metadata.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from co_detr.data.boxes import BoxChecker
from co_detr.data.coco_file import listed_files, read_coco, shortened
from co_detr.data.polygons import checked_polygons
from co_detr.errors import DataError

logger = logging.getLogger(__name__)


def load_coco(
    annotation_file: str,
    image_root: str,
    num_classes: int | None = None,
    invalid_boxes: str = "error",
    image_path: Callable[[dict[str, Any]], str] | None = None,
    partial_classes: bool = False,
    with_masks: bool = False,
) -> list[dict[str, Any]]:
    """Reads a COCO-format json and registers its classes under `dataset_name(annotation_file)`.

    Args:
        annotation_file: json with the lists `images`, `annotations` and `categories`.
        image_root: directory that the paths of the images are relative to.
        num_classes: what the model was built for; None: not checked.
        invalid_boxes: "error", or "skip" to leave out boxes that have no area inside the image.
        image_path: gives the path of an entry of `images`; None: its `file_name`.
        partial_classes: let the file have fewer classes than `num_classes`, as a val set may have;
            `align_classes` then has to say which ones they are.
        with_masks: keep the polygons, for heads that learn masks (crowds have none).

    Returns:
        One dict per image (images without boxes included), ordered by image id: `file_name`,
        `height`, `width`, `image_id`, and `annotations` with `bbox` (x, y, w, h in pixels),
        `bbox_mode`, contiguous `category_id` and `iscrowd`, with masks also `segmentation`, a list
        of polygons [x, y, x, y, ..] in pixels. Boxes are clipped to the image.

    Raises:
        DataError: in one sentence that names the file, image or annotation and the mend.
    """
    content = read_coco(annotation_file)
    if image_path is not None:
        for image in content["images"]:
            image["file_name"] = image_path(image)
    if partial_classes and num_classes is not None and len(content["categories"]) < num_classes:
        num_classes = None
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
                f"not in 'categories' ({shortened(contiguous_ids)}): add the category or correct "
                "the id."
            )
        box = boxes.clip(annotation, record)
        if box is not None:
            kept = {
                "bbox": box,
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": contiguous_ids[category_id],
                "iscrowd": int(annotation.get("iscrowd", 0)),
            }
            if with_masks and not kept["iscrowd"]:
                image = f"{where} (image {record['file_name']})"
                kept["segmentation"] = checked_polygons(annotation.get("segmentation"), image)
            record["annotations"].append(kept)
    boxes.report()
    dataset = [records[image_id] for image_id in sorted(records)]
    count = sum(len(record["annotations"]) for record in dataset)
    logger.info("%s: %d images, %d boxes.", annotation_file, len(dataset), count)
    return dataset


def dataset_name(annotation_file: str) -> str:
    """The name under which Detectron2's `MetadataCatalog` knows the file."""
    return f"coco:{os.path.abspath(annotation_file)}"


def class_names(annotation_file: str) -> list[str]:
    """The classes of a loaded file, in the order of their contiguous ids."""
    return list(MetadataCatalog.get(dataset_name(annotation_file)).thing_classes)


def align_classes(annotation_file: str, names: Sequence[str]) -> None:
    """Makes contiguous ids of a loaded file mean `names`, the classes of the model, by name.

    For the evaluation of files whose ids or order differ, or that lack some of the classes; those
    get keys in `thing_dataset_id_to_contiguous_id` that are no category of the file. Only the
    metadata changes, not the records, whose categories an evaluation does not read.

    Raises:
        DataError: if the file has a class that is not in `names`, or if names occur twice.
    """
    metadata = MetadataCatalog.get(dataset_name(annotation_file))
    own = metadata.thing_classes
    if own == list(names):
        return
    unknown = [name for name in own if name not in names]
    if unknown or len(set(own)) < len(own) or len(set(names)) < len(names):
        raise DataError(
            f"{annotation_file} has the categories ({shortened(own)}) but the model is for "
            f"({shortened(names)}): give data.train and data.val the same categories, each with "
            "a name of its own."
        )
    ids = dict(zip(own, metadata.thing_dataset_id_to_contiguous_id, strict=True))
    aligned = {ids.get(name, f"not in the file: {name}"): i for i, name in enumerate(names)}
    # In place: evaluators and visualisers hold this metadata, and Detectron2 lets nobody set it.
    metadata.thing_dataset_id_to_contiguous_id.clear()
    metadata.thing_dataset_id_to_contiguous_id.update(aligned)
    own[:] = names
    logger.info("%s: classes are matched with the model's by name.", annotation_file)


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
            f"{annotation_file} has {len(names)} categories ({shortened(names)}) but the model "
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
    directories = {os.path.dirname(image.get("file_name", "")) for image in images}
    present = listed_files(image_root, directories)
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
