"""The classes of a COCO-format file: their numbers, Detectron2's register, and those of a model.

The ids of a file may be any numbers or texts; a model knows classes by contiguous numbers. Both,
and the names, stand in the `MetadataCatalog` under `dataset_name(annotation_file)`, where
evaluators and visualizers look for them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from detectron2.data import MetadataCatalog

from co_detr.data.coco_file import CocoFile, display_names, is_id, read_coco, shortened
from co_detr.errors import DataError

logger = logging.getLogger(__name__)


def dataset_name(annotation_file: str) -> str:
    """The name under which Detectron2's `MetadataCatalog` knows the file."""
    return f"coco:{os.path.abspath(annotation_file)}"


def register_classes(annotation_file: str) -> None:
    """Makes the classes of a file known as `load_coco` does, without a look at its images.

    For evaluators of detections that lie on the disk.

    Raises:
        DataError: if a category lacks an id or a name, or repeats an id.
    """
    register_categories(read_coco(annotation_file), "", None, partial_classes=False)


def class_names(annotation_file: str) -> list[str]:
    """The classes of a loaded file, in the order of their contiguous ids."""
    return list(MetadataCatalog.get(dataset_name(annotation_file)).thing_classes)


def align_classes(annotation_file: str, names: Sequence[str]) -> None:
    """Makes contiguous ids of a loaded file mean `names`, the classes of the model, by name.

    For the evaluation of files whose ids or order differ, or that lack some of the classes; those
    get keys in `thing_dataset_id_to_contiguous_id` that are no category of the file. A file without
    categories, as a test set may be, gets all of them, numbered from 1. Only the metadata changes,
    not the records, whose categories an evaluation does not read.

    Raises:
        DataError: if the file has a class that is not in `names`, or if names occur twice.
    """
    metadata = MetadataCatalog.get(dataset_name(annotation_file))
    own = metadata.thing_classes
    if own == list(names):
        return
    aligned: dict[int | str, int]
    unknown = [name for name in own if name not in names]
    if unknown or len(set(own)) < len(own) or len(set(names)) < len(names):
        raise DataError(
            f"{annotation_file} has the categories ({shortened(own)}) but the model is for "
            f"({shortened(names)}): give data.train and data.val the same categories, each with "
            "a name of its own."
        )
    ids = dict(zip(own, metadata.thing_dataset_id_to_contiguous_id, strict=True))
    if own:
        aligned = {ids.get(name, f"not in the file: {name}"): i for i, name in enumerate(names)}
    else:
        aligned = {i + 1: i for i in range(len(names))}
    # In place: evaluators and visualizers hold this metadata, and Detectron2 lets nobody set it.
    metadata.thing_dataset_id_to_contiguous_id.clear()
    metadata.thing_dataset_id_to_contiguous_id.update(aligned)
    own[:] = names
    logger.info("%s: classes are matched with the model's by name.", annotation_file)


def require_ids(ids: list[Any], key: str, annotation_file: str) -> None:
    """Ids are whole numbers, or all of them are texts.

    Args:
        key: of the list in the file that they are from.

    Raises:
        DataError: if they are not.
    """
    wrong = [value for value in ids if not is_id(value)]
    if wrong or len({type(value) for value in ids}) > 1:
        shown = wrong or [next(v for v in ids if type(v) is kind) for kind in (int, str)]
        raise DataError(
            f"'{key}' of {annotation_file} has the id{'s' * (len(shown) > 1)} "
            f"{shortened(map(repr, shown))}: use whole numbers as ids, not text beside numbers."
        )


def register_categories(
    content: CocoFile, image_root: str, num_classes: int | None, partial_classes: bool
) -> dict[int | str, int]:
    """Fills the metadata and returns category id -> contiguous id."""
    annotation_file = content.path
    for category in content.categories:
        if "id" not in category or "name" not in category:
            raise DataError(f"category {category} of {annotation_file} needs an id and a name.")
    require_ids([category["id"] for category in content.categories], "categories", content.path)
    by_id = display_names(content.categories)
    names = list(by_id.values())
    contiguous_ids = {key: i for i, key in enumerate(by_id)}
    if len(contiguous_ids) != len(content.categories):
        raise DataError(f"'categories' of {annotation_file} repeats an id: make the ids unique.")
    if num_classes is not None and len(names) != num_classes:
        remedy = f"set model.num_classes={len(names)}"
        if partial_classes:
            remedy = f"remove those that it does not know and their boxes, or {remedy}"
        raise DataError(
            f"{annotation_file} has {len(names)} categories ({shortened(names)}) but the model "
            f"has {num_classes}: {remedy}."
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
