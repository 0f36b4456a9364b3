"""Reading COCO-format files; what has only one meaning is read, however a tool has written it.

All that use an annotation file get it from here: preflight, training, evaluation and plots see the
same ids, areas and boxes.
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from co_detr.data.polygons import enclosing_box
from co_detr.errors import DataError

Entry = dict[str, Any]

# Where whole numbers belong; pandas writes those of a column with gaps as 1.0.
_WHOLE = {
    "images": ("id", "width", "height"),
    "annotations": ("id", "image_id", "category_id"),
    "categories": ("id",),
}
_WHOLE_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")  # LVIS: of an image

# What a file that is no json begins with.
_STRANGERS = (
    (b"version https://git-lfs", "it is the pointer of a large file in Git: run git lfs pull"),
    (b"\x1f\x8b", "it is compressed with gzip: unpack it"),
    (b"PK\x03\x04", "it is a zip archive: unpack it"),
    (b"<", "it is a web page or xml: fetch the json, or convert with tools/convert_dataset.py"),
)


@dataclass(frozen=True)
class Mend:
    """Something that a file writes in an odd way: what, in the plural, and how it was read."""

    what: str
    how: str


_FLOAT_IDS = Mend("ids that are written with a decimal point", "read as whole numbers")
_AREAS = Mend("annotations whose area is no positive number", "computed anew from their boxes")
_NO_BOXES = Mend("annotations without a bbox", "taken from their segmentation")


@dataclass(frozen=True)
class CocoFile:
    """Content of an annotation file, mended.

    Attributes:
        path: of the file.
        images, annotations, categories: its lists. Ids are whole numbers or text as far as they
            can be; every annotation with a box of four numbers has an `area` and an `iscrowd`.
        mended: what was read otherwise than it is written, with the cases of each.
    """

    path: str
    images: list[Entry]
    annotations: list[Entry]
    categories: list[Entry]
    mended: dict[Mend, list[str]] = field(default_factory=dict)


# Files that were read with `keep`, until they are read again.
_kept: dict[tuple[str, int, int], CocoFile] = {}


def read_coco(annotation_file: str, keep: bool = False) -> CocoFile:
    """Reads a json file that has COCO's three lists of objects.

    UTF-8, UTF-16 and UTF-32 are read, with or without a byte-order mark. A file without labels,
    as of a test set, may lack `annotations` and `categories`: both are [] then.

    Args:
        keep: hold the result for the next call with the same file, which then need not parse it
            again; it has to come, as the content can take gigabytes. Nobody may change entries.

    Raises:
        DataError: if it is missing, no json or not COCO format.
    """
    try:
        status = os.stat(annotation_file)
    except OSError:
        status = None
    if status is None or not os.path.isfile(annotation_file):
        what = "is a folder" if os.path.isdir(annotation_file) else "does not exist"
        raise DataError(
            f"annotation file {annotation_file} {what}: set data.train and data.val to your "
            "COCO-format json files."
        )
    key = (os.path.abspath(annotation_file), status.st_mtime_ns, status.st_size)
    content = _kept.pop(key, None) or _mended(annotation_file, _parsed(annotation_file))
    if keep:
        _kept[key] = content
    return content


def display_names(categories: Iterable[Entry]) -> dict[int | str, str]:
    """Category id -> name, in the order of the ids.

    Two classes of one name are told apart by their ids, as "apple (id 3)": tables, metrics and
    checkpoints know classes by their names.
    """
    ordered = sorted(categories, key=lambda category: category["id"])
    count = Counter(str(category["name"]) for category in ordered)
    return {
        category["id"]: str(category["name"])
        if count[str(category["name"])] == 1
        else f"{category['name']} (id {category['id']})"
        for category in ordered
    }


def shortened(values: Iterable[Any], limit: int = 10) -> str:
    """The first values as text for a message."""
    texts = [str(value) for value in values]
    more = [f"and {len(texts) - limit} more"] if len(texts) > limit else []
    return ", ".join(texts[:limit] + more)


def is_id(value: Any) -> bool:
    """Whether it can identify an entry: a whole number or text."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite number, as json has them: true and false are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_box(value: Any) -> bool:
    """Whether it is a list of four finite numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def _parsed(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except OSError as error:
        raise DataError(
            f"annotation file {path} cannot be read ({error.strerror}): correct its permissions."
        ) from error
    if not raw.strip():
        raise DataError(f"{path} is empty: write it again or fetch it again.")
    try:
        return json.loads(raw)  # finds out the encoding
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        strange = next((what for start, what in _STRANGERS if raw.startswith(start)), None)
        if strange is not None:
            sentence = f"{path} is not json; {strange}."
        elif isinstance(error, UnicodeDecodeError):
            sentence = (
                f"{path} is not UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start}): "
                "save it as UTF-8."
            )
        else:
            sentence = f"{path} is not valid json ({error}): write it again or fetch it again."
        raise DataError(sentence) from error


def _mended(path: str, content: Any) -> CocoFile:
    lists = {key: _entries(path, content, key) for key in ("images", "annotations", "categories")}
    mended: dict[Mend, list[str]] = {}
    for key, names in _WHOLE.items():
        for entry in lists[key]:
            for name in names:
                value = entry.get(name)
                if isinstance(value, float) and value.is_integer():
                    entry[name] = int(value)
                    if name not in ("width", "height"):
                        mended.setdefault(_FLOAT_IDS, []).append(f"{name} {value!r} in '{key}'")
    for image in lists["images"]:
        for name in _WHOLE_LISTS:
            if isinstance(image.get(name), list):
                image[name] = [int(each) if _is_whole(each) else each for each in image[name]]
    for category in lists["categories"]:
        if isinstance(category.get("name"), str):
            # Some systems write accents as characters of their own: the name is the same.
            category["name"] = unicodedata.normalize("NFC", category["name"])
    for annotation in lists["annotations"]:
        for mend, was in _mend_annotation(annotation):
            mended.setdefault(mend, []).append(f"id {annotation.get('id')!r}, {was}")
    return CocoFile(path, **lists, mended=mended)


def _entries(path: str, content: Any, key: str) -> list[Entry]:
    entries = content.get(key) if isinstance(content, dict) else None
    if entries is None and isinstance(content, dict) and content.get("images"):
        unlabeled = not content.get("annotations")
        if key == "annotations" or (key == "categories" and unlabeled):
            return []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(
            f"{path} is not in COCO format: it has no list '{key}' of objects; it needs 'images', "
            "'annotations' and 'categories'."
        )
    return entries


def _mend_annotation(entry: Entry) -> list[tuple[Mend, str]]:
    """Changes an annotation in place; returns what is worth telling, and what was there."""
    told = []
    if entry.get("bbox") in (None, []):
        box = enclosing_box(entry.get("segmentation"))
        if box is not None:
            told.append((_NO_BOXES, f"now {box}"))
            entry["bbox"] = box
    crowd = entry.get("iscrowd")
    if crowd is None or isinstance(crowd, bool) or _is_whole(crowd):
        entry["iscrowd"] = int(crowd or 0)
    box = entry.get("bbox")
    if is_box(box):
        area = entry.get("area")
        if not (is_number(area) and area > 0):
            if "area" in entry:
                told.append((_AREAS, f"area {area!r}"))
            entry["area"] = box[2] * box[3]
    return told


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()
