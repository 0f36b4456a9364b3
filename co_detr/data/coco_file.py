"""Reading COCO-format files: the json itself, and which image files there are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

from co_detr.errors import DataError


def read_coco(annotation_file: str) -> dict[str, list[dict[str, Any]]]:
    """Reads a json file that has COCO's three lists of objects.

    Raises:
        DataError: if it is missing, no json or not COCO format.
    """
    if not os.path.isfile(annotation_file):
        raise DataError(
            f"annotation file {annotation_file} does not exist: set data.train and data.val to "
            "your COCO-format json files."
        )
    try:
        with open(annotation_file, encoding="utf-8") as file:
            content = json.load(file)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{annotation_file} is not UTF-8 (byte 0x{error.object[error.start]:02x} at position "
            f"{error.start}): save it as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
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


def shortened(values: Iterable[Any], limit: int = 10) -> str:
    """The first values as text for a message."""
    texts = [str(value) for value in values]
    more = [f"and {len(texts) - limit} more"] if len(texts) > limit else []
    return ", ".join(texts[:limit] + more)


def listed_files(root: str, directories: set[str]) -> set[str]:
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
