"""YOLO data sets: a text file per image; a yaml file or names of folders say where they lie."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from co_detr.data.coco_file import shortened
from co_detr.errors import DataError
from co_detr.tools.convert.dataset import (
    SPLITS,
    XYXY,
    Example,
    ImageSize,
    LabeledBox,
    Labels,
    find_splits,
    first_folder,
    image_files,
    places_of,
    read_class_names,
    read_text,
    unique_names,
)

_CLASS_FILES = ("classes.txt", "obj.names", "labels/classes.txt", "train/labels/classes.txt")
_EXPECTED = "the same name with .txt, in labels/ instead of images/ or beside it"
_NO_LABELS = frozenset(Path(name).name for name in _CLASS_FILES)

# Coordinates may be this much outside of the image, whose edge then clips the box. What is further
# out is no rounding but another format, such as pixels.
_MARGIN = 0.1


@dataclass(frozen=True)
class YoloLayout:
    """See `Layout`; with `keypoints`, lines have some behind their box."""

    splits: dict[str, list[Example]]
    class_names: Sequence[str]
    orphans: list[Path]
    notes: list[str]
    keypoints: bool

    def read(self, label: Path, size: ImageSize) -> Labels:
        return read_yolo_labels(label, size, self.class_names, self.keypoints)


def find_yolo(
    source: Path,
    class_names: Sequence[str] | None = None,
    optional: Collection[str] = ("test",),
) -> YoloLayout:
    """Finds the parts of a YOLO data set.

    Args:
        source: its folder or its yaml file.
        class_names: in the order of their numbers; by default those of the yaml file, or of
            classes.txt or obj.names.
        optional: see `find_splits`.

    Raises:
        DataError: if a part is missing.
    """
    file = source if source.is_file() else _yaml_file(source)
    root = source.parent if source.is_file() else source
    content = {} if file is None else _read_yaml(file)
    names = class_names or _class_names(content, file, root)
    notes: list[str] = []

    def find(split: str) -> list[Example] | None:
        if file and _has_splits(content):
            images = _named_images(content, file, split)
        else:
            images = _images(root, split)
        return images and [Example(path, _label_file(path)) for path in dict.fromkeys(images)]

    splits = find_splits(find, _EXPECTED, optional, notes)
    if not splits and not notes and not _has_splits(content):
        # A single set counts as train.
        images = image_files(first_folder([root / "images"]) or root)
        examples = [Example(path, _label_file(path)) for path in images]
        single = {"train": examples}.get
        splits = find_splits(single, _EXPECTED, (), notes)
    return YoloLayout(splits, names, _orphans(splits), notes, "kpt_shape" in content)


def _yaml_file(folder: Path) -> Path | None:
    files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    named = [path for path in files if path.stem in ("data", "dataset")] or files
    if len(named) > 1:
        names = ", ".join(path.name for path in named)
        raise DataError(f"{folder} has several yaml files ({names}): name the one to read.")
    return named[0] if named else None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not valid yaml ({reason}): correct it.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} has no keys such as names, train and val: add them.")
    return content


def _has_splits(content: dict[str, Any]) -> bool:
    return any(content.get(alias) for aliases in SPLITS.values() for alias in aliases)


def _class_names(content: dict[str, Any], file: Path | None, root: Path) -> list[str]:
    names = content.get("names")
    if names is None:
        found = next((root / name for name in _CLASS_FILES if (root / name).is_file()), None)
        if found is None:
            raise DataError(
                f"{file or root} does not say the names of the classes: add classes.txt with one "
                "per line, or pass --classes FILE."
            )
        return read_class_names(found)
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise DataError(f"{file} numbers its names not from 0 on: correct the keys of names.")
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list):
        raise DataError(f"{file} has names that are no list: write names: [first, second].")
    count = content.get("nc", len(names))
    if count != len(names):
        raise DataError(f"{file} has nc: {count} but {len(names)} names: correct one of them.")
    return unique_names([str(name) for name in names], file)


def _named_images(content: dict[str, Any], file: Path, split: str) -> list[Path] | None:
    """Images of a set that a yaml file names: a folder, a text file, or a list of them."""
    value = next((content[alias] for alias in SPLITS[split] if content.get(alias)), None)
    if value is None:
        return None
    root = file.parent / str(content.get("path") or "")
    if not root.is_dir():
        root = file.parent  # the data set was moved
    images = []
    for entry in value if isinstance(value, list) else [value]:
        images += _images_of(_resolve(str(entry), root, file), root)
    return images


def _resolve(entry: str, root: Path, file: Path) -> Path:
    # Exports often write ../train/images where they mean train/images.
    found = next((path for path in places_of(entry, (root, file.parent)) if path.exists()), None)
    if found is None:
        raise DataError(f"{file} names {entry}, which is not in {root}: correct the path.")
    return found


def _images_of(path: Path, root: Path) -> list[Path]:
    if path.is_dir():
        return image_files(path)
    if path.suffix.lower() != ".txt":
        raise DataError(f"{path} is no folder and no .txt list of images: name one.")
    return _listed_in(path, root)


def _listed_in(path: Path, root: Path) -> list[Path]:
    images = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        entry = line.strip()
        if not entry:
            continue
        # Lists are written from the view of their own folder, of the data set or above it.
        places = places_of(entry, (path.parent, root, root.parent))
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise DataError(
                f"{path} line {number} names {entry}, which is not in {root}: correct the path."
            )
        images.append(found)
    return images


def _images(root: Path, split: str) -> list[Path] | None:
    """Images of a set of a data set without a yaml file."""
    for alias in SPLITS[split]:
        places = (root / "images" / alias, root / alias / "images", root / alias)
        folder, listing = first_folder(places), root / f"{alias}.txt"
        if folder or listing.is_file():
            return image_files(folder) if folder else _listed_in(listing, root)
    return None


def _label_file(image: Path) -> Path | None:
    """In labels/ where the path of the image has images/ (the last one), or beside the image."""
    parts = list(image.with_suffix(".txt").parts)
    places = [Path(*parts)]
    if "images" in parts[:-1]:
        index = len(parts) - 1 - parts[::-1].index("images")
        places.insert(0, Path(*parts[:index], "labels", *parts[index + 1 :]))
    return next((path for path in places if path.is_file()), None)


def _orphans(splits: dict[str, list[Example]]) -> list[Path]:
    used = {example.label for examples in splits.values() for example in examples}
    folders = {label.parent for label in used if label}
    return sorted(
        path
        for folder in folders
        if "labels" in folder.parts
        for path in folder.glob("*.txt")
        if path not in used and path.name not in _NO_LABELS
    )


def read_yolo_labels(
    path: Path, size: ImageSize, class_names: Sequence[str], keypoints: bool = False
) -> Labels:
    """Reads boxes (``class cx cy w h``) and polygons (``class x y x y x y ...``), which are masks.

    Coordinates are those of the upright image. Oriented boxes (``class`` and four corners) are
    polygons of four points; a data set that has no others has no masks (see `convert`).

    Args:
        keypoints: the lines are boxes with keypoints behind, which are left out.

    Raises:
        DataError: if a line is neither, or its class does not exist.
    """
    boxes = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        where = f"{path} line {number}"
        values = _numbers(fields, where)
        name = _class_name(values[0], class_names, where)
        left, top, right, bottom = _corners(values[1:], keypoints, where)
        scaled = (
            *(left * size.width, top * size.height),
            *(right * size.width, bottom * size.height),
        )
        mask = None
        if len(values) > 5 and not keypoints:
            sides = (size.width, size.height) * (len(values) // 2)
            points = zip(values[1:], sides, strict=False)
            mask = [[round(value * side, 2) for value, side in points]]
        boxes.append(LabeledBox(name, scaled, mask=mask))
    return Labels(boxes)


def _numbers(fields: list[str], where: str) -> list[float]:
    values = []
    for field in fields:
        try:
            values.append(float(field))
        except ValueError:
            raise DataError(f"{where} has {field!r}, which is no number: correct it.") from None
        if not math.isfinite(values[-1]):
            raise DataError(f"{where} has {field}, which is no finite number: correct it.")
    return values


def _class_name(value: float, class_names: Sequence[str], where: str) -> str:
    if not (value.is_integer() and 0 <= value < len(class_names)):
        raise DataError(
            f"{where} has class {value:g}, but the classes are numbered from 0 to "
            f"{len(class_names) - 1} ({shortened(class_names)}): correct it or add the class."
        )
    return class_names[int(value)]


def _corners(values: list[float], keypoints: bool, where: str) -> XYXY:
    """The box (x0, y0, x1, y1), normalized."""
    if len(values) == 4 or (keypoints and len(values) > 4):
        _require_normalized(values[:4], where)
        x, y, width, height = values[:4]
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    if len(values) < 6 or len(values) % 2:
        hint = " (if the last one is a confidence, remove it)" if len(values) == 5 else ""
        raise DataError(
            f"{where} has {len(values)} numbers behind the class{hint}: write four for a box, or "
            "x and y of at least three points."
        )
    _require_normalized(values, where)
    xs, ys = values[0::2], values[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def _require_normalized(values: list[float], where: str) -> None:
    for value in values:
        if not -_MARGIN <= value <= 1 + _MARGIN:
            raise DataError(
                f"{where} has {value:g}, which is not from 0 to 1: divide x and width by the width "
                "of the image, y and height by its height."
            )
