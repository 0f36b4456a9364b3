"""Reading COCO-format files; what has only one meaning is read, however a tool has written it.

All that use an annotation file get it from here: preflight, training, evaluation and plots see the
same ids, areas, boxes and polygons, and find the image files that it names in the same places.
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from numbers import Real
from typing import Any
from urllib.parse import unquote

from co_detr.data.segmentation import check_mask, extent_of
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
_MOST_FOLDERS = 300  # that are searched for a hint


@dataclass(frozen=True)
class Correction:
    """Something that a file writes in an odd way: what, in the plural, and how it was read."""

    what: str
    how: str


_FLOAT_IDS = Correction("ids that are written with a decimal point", "read as whole numbers")
_AREAS = Correction(
    "annotations whose area is no positive number", "computed anew from their boxes"
)
_NO_BOXES = Correction("annotations without a bbox", "taken from their segmentation")


@dataclass(frozen=True)
class CocoFile:
    """Content of an annotation file, corrected.

    Attributes:
        path: of the file.
        images, annotations, categories: its lists. Ids are whole numbers or text as far as they
            can be; every annotation with a box of four numbers has an `area` and an `iscrowd`.
        corrected: what was read otherwise than it is written, with the cases of each.
        others: what else is in the file, such as `info` and `licenses`, as it is.
    """

    path: str
    images: list[Entry]
    annotations: list[Entry]
    categories: list[Entry]
    corrected: dict[Correction, list[str]] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)


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
    content = _kept.pop(key, None) or _corrected(annotation_file, read_json(annotation_file))
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


def read_json(path: str) -> Any:
    """The content of a json file in UTF-8, UTF-16 or UTF-32.

    Raises:
        DataError: if it cannot be read, or is no json.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): correct the path or its permissions."
        ) from error
    if not raw.strip():
        raise DataError(f"{path} is empty: write it again or fetch it again.")
    try:
        return json.loads(raw)  # finds out the encoding
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
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


def _corrected(path: str, content: Any) -> CocoFile:
    lists = {key: _entries(path, content, key) for key in ("images", "annotations", "categories")}
    corrected: dict[Correction, list[str]] = {}
    for key, names in _WHOLE.items():
        for entry in lists[key]:
            for name in names:
                value = entry.get(name)
                if isinstance(value, float) and value.is_integer():
                    entry[name] = int(value)
                    if name not in ("width", "height"):
                        corrected.setdefault(_FLOAT_IDS, []).append(f"{name} {value!r} in '{key}'")
    for image in lists["images"]:
        for name in _WHOLE_LISTS:
            if isinstance(image.get(name), list):
                image[name] = [int(side) if _is_whole(side) else side for side in image[name]]
    for category in lists["categories"]:
        if isinstance(category.get("name"), str):
            # Some systems write accents as characters of their own: the name is the same.
            category["name"] = unicodedata.normalize("NFC", category["name"])
    for annotation in lists["annotations"]:
        for correction, was in _correct_annotation(annotation):
            corrected.setdefault(correction, []).append(f"id {annotation.get('id')!r}, {was}")
    others = {key: value for key, value in content.items() if key not in lists}
    return CocoFile(path, **lists, corrected=corrected, others=others)


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


def _correct_annotation(entry: Entry) -> list[tuple[Correction, str]]:
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


def enclosing_box(segmentation: Any) -> list[float] | None:
    """The box (x, y, w, h) around polygons or a run-length mask; None if there is no area."""
    if isinstance(segmentation, dict):
        return _box_of_mask(segmentation)
    polygons = segmentation if isinstance(segmentation, list) else []
    numbers = [polygon for polygon in polygons if isinstance(polygon, list)]
    if not numbers or not all(isinstance(value, Real) for part in numbers for value in part):
        return None
    xs = [value for part in numbers for value in part[0::2]]
    ys = [value for part in numbers for value in part[1::2]]
    if len(xs) < 3 or len(xs) != len(ys):
        return None
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    return box if box[2] > 0 and box[3] > 0 else None


def _box_of_mask(segmentation: dict[str, Any]) -> list[float] | None:
    size = segmentation.get("size")
    if not isinstance(size, list) or len(size) != 2 or not all(map(is_number, size)):
        return None
    usable = check_mask(segmentation, *size).usable
    if usable is None:
        return None
    left, top, right, bottom = extent_of(usable)
    return [left, top, right - left, bottom - top]


@dataclass(frozen=True)
class LocatedFiles:
    """Files that names stand for.

    Attributes:
        root: folder that paths are relative to.
        paths: name -> path below `root`, of all that were found.
        missing: names that no file was found for.
        shared: those of `missing` that would stand for one file together with another name.
    """

    root: str
    paths: dict[str, str]
    missing: list[str]
    shared: list[str]

    @property
    def moved(self) -> list[str]:
        """Names whose file is not where they say."""
        return [name for name, path in self.paths.items() if name != path]

    def hint(self) -> str:
        """What could be behind the first missing file: part of a sentence, "" without an idea."""
        if not self.missing:
            return ""
        name = self.missing[0]
        if name in self.shared:
            return f"{name!r} and another name lead to one file"
        path = _similar_file(name, self.root)
        if path is None:
            return ""
        folder = _folder_above(path, name)
        if folder is not None:
            return f"{name!r} would be found in the directory {folder}"
        return f"{path} has a similar name"


def locate_files(names: Iterable[str], root: str) -> LocatedFiles:
    """Looks names of an annotation file up.

    A name that leads to no file may come from another system or machine: backslashes, escapes of
    URLs (%20), other letter case or another Unicode form, and folders in front that are not there
    (C:\\data\\a.jpg, /home/other/a.jpg) are overlooked if exactly one file is left then. Files in
    folders that a name does not have are never taken: they may be other images of that name.
    """
    folder = _Folder(root)
    found = {name: folder.find(name) for name in dict.fromkeys(names)}
    wanted = Counter(found.values())
    shared = [n for n, path in found.items() if path not in (None, n) and wanted[path] > 1]
    for name in shared:
        found[name] = None
    return LocatedFiles(
        root=root,
        paths={name: path for name, path in found.items() if path is not None},
        missing=[name for name, path in found.items() if path is None],
        shared=shared,
    )


class _Folder:
    """Lists every directory once instead of a look-up per file: large sets often lie on network
    disks."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._names: dict[str, set[str]] = {}
        self._folded: dict[str, dict[str, list[str]]] = {}

    def find(self, name: str) -> str | None:
        """The path below the root that a name stands for."""
        directory, base = os.path.split(name)
        if base in self._list(directory) or os.path.isfile(os.path.join(self.root, name)):
            return name
        parts = _parts(name)
        ways = (self._follow(parts[start:]) for start in range(len(parts)))
        return next((path for path in ways if path is not None), None)

    def _follow(self, parts: list[str]) -> str | None:
        path = ""
        for part in parts:
            names = self._list(path)
            if part not in names:
                similar = self._fold(path).get(_folded(part), [])
                if len(similar) != 1:
                    return None
                part = similar[0]
            path = os.path.join(path, part)
        return path if os.path.isfile(os.path.join(self.root, path)) else None

    def _list(self, directory: str) -> set[str]:
        if directory not in self._names:
            path = os.path.join(self.root, directory)
            try:
                self._names[directory] = set(os.listdir(path))
            except OSError:  # no directory, or not for us: then nothing is found in it
                self._names[directory] = set()
        return self._names[directory]

    def _fold(self, directory: str) -> dict[str, list[str]]:
        if directory not in self._folded:
            folded: dict[str, list[str]] = {}
            for name in sorted(self._list(directory)):
                folded.setdefault(_folded(name), []).append(name)
            self._folded[directory] = folded
        return self._folded[directory]


def _parts(name: str) -> list[str]:
    """Folders and file of a path or URL in any notation."""
    if "://" in name:
        name = name.partition("://")[2].partition("?")[0]
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unquote(name)).casefold().strip()


def _similar_file(name: str, root: str) -> str | None:
    """A file of that name, or else of that name with another ending, near the root."""
    parts = _parts(name)
    if not parts:
        return None
    wanted = _folded(parts[-1])
    stem, other = os.path.splitext(wanted)[0], None
    for top in (root, os.path.dirname(os.path.abspath(root))):
        for folder, _, files in islice(os.walk(top), _MOST_FOLDERS):
            for file in sorted(files):
                if _folded(file) == wanted:
                    return os.path.join(folder, file)
                if other is None and os.path.splitext(_folded(file))[0] == stem:
                    other = os.path.join(folder, file)
    return other


def _folder_above(path: str, name: str) -> str | None:
    """The directory in which `name` leads to `path`; None if its own folders are others."""
    parts, wanted = os.path.abspath(path).split(os.sep), _parts(name)
    if list(map(_folded, parts[-len(wanted) :])) != list(map(_folded, wanted)):
        return None
    return os.sep.join(parts[: -len(wanted)])
