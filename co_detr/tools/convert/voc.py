"""VOC data sets: images, an xml file for each, and lists of names that make up the sets."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_utils
import torch
from torchvision.ops import box_iou

from co_detr.data.images import ImageReader
from co_detr.errors import DataError
from co_detr.tools.convert.dataset import (
    SPLITS,
    XYXY,
    Example,
    ImageSize,
    LabeledBox,
    Labels,
    Remark,
    find_splits,
    first_folder,
    image_files,
    read_text,
)

_EXPECTED = "the same name with .xml, in Annotations or beside it"

# The lists of a class, such as cat_train.txt, and some tools have a column behind the name.
_LINE = re.compile(r"(.*?)(\s+-?[01])?")


@dataclass(frozen=True)
class VocRules:
    """What the format leaves open.

    Attributes:
        zero_based: coordinates are edges counted from 0. VOC itself counts pixels from 1, and its
            xmax and ymax are the last pixels inside.
        keep_difficult: objects marked as difficult are like others. VOC leaves them out of its
            evaluation, which comes nearest to COCO's crowd regions.
    """

    zero_based: bool = False
    keep_difficult: bool = False


@dataclass(frozen=True)
class VocLayout:
    """See `Layout`."""

    splits: dict[str, list[Example]]
    class_names: Sequence[str] | None
    orphans: list[Path]
    notes: list[str]
    rules: VocRules

    def read(self, label: Path, size: ImageSize) -> Labels:
        return read_voc_labels(label, size, self.rules)


_Find = Callable[[str], list[Example] | None]


def find_voc(
    folder: Path,
    rules: VocRules,
    class_names: Sequence[str] | None = None,
    optional: Collection[str] = ("test",),
) -> VocLayout:
    """Finds the parts of a VOC data set.

    These are JPEGImages, Annotations and, as far as there are any, the lists train.txt, val.txt
    and test.txt in ImageSets/Main; or folders train, valid and test (or just `folder`) with xml
    files beside the images.

    Args:
        optional: see `find_splits`.

    Raises:
        DataError: if a part is missing.
    """
    notes: list[str] = []
    if (folder / "Annotations").is_dir():
        find, everything, orphans = _by_lists(folder)
    else:
        find, everything, orphans = _by_folders(folder)
    splits = find_splits(find, _EXPECTED, optional, notes)
    if not splits and not notes:
        splits = find_splits({"train": everything()}.get, _EXPECTED, (), notes)
    return VocLayout(splits, class_names, orphans, notes, rules)


def _by_lists(folder: Path) -> tuple[_Find, Callable[[], list[Example]], list[Path]]:
    """What finds a set, what gives all images as one, and labels without an image."""
    annotations = folder / "Annotations"
    places = (folder / name for name in ("JPEGImages", "images", "Images"))
    images = _by_stem(image_files(first_folder(places) or annotations))
    labels = {path.stem: path for path in annotations.glob("*.xml")}
    lists = first_folder((folder / "ImageSets" / "Main", folder / "ImageSets"))

    def examples(stems: Iterable[str]) -> list[Example]:
        return [Example(_the_image(images[stem], stem), labels.get(stem)) for stem in stems]

    def find(split: str) -> list[Example] | None:
        files = [lists / f"{alias}.txt" for alias in SPLITS[split]] if lists else []
        file = next((path for path in files if path.is_file()), None)
        return file and examples(dict.fromkeys(_listed_stems(file, images)))

    orphans = sorted(path for stem, path in labels.items() if stem not in images)
    return find, lambda: examples(sorted(images)), orphans


def _by_folders(folder: Path) -> tuple[_Find, Callable[[], list[Example]], list[Path]]:
    """As `_by_lists`; the labels without an image are known when the sets are found."""
    orphans: list[Path] = []

    def examples(place: Path) -> list[Example]:
        found, lonely = _beside(place)
        orphans.extend(lonely)
        return found

    def find(split: str) -> list[Example] | None:
        place = first_folder(folder / alias for alias in SPLITS[split])
        return place and examples(place)

    return find, lambda: examples(folder), orphans


def _beside(folder: Path) -> tuple[list[Example], list[Path]]:
    """The images of a folder with the xml files beside them, and the xml files without image."""
    images = image_files(folder)
    labels = {image: image.with_suffix(".xml") for image in images}
    used = set(labels.values())
    orphans = sorted(path for path in folder.rglob("*.xml") if path not in used)
    return [Example(i, label if label.is_file() else None) for i, label in labels.items()], orphans


def _by_stem(images: list[Path]) -> dict[str, list[Path]]:
    by_stem: dict[str, list[Path]] = {}
    for path in images:
        by_stem.setdefault(path.stem, []).append(path)
    return by_stem


def _the_image(paths: list[Path], stem: str) -> Path:
    if len(paths) > 1:
        names = " and ".join(path.name for path in paths)
        raise DataError(f"{stem} could be {names} in {paths[0].parent}: remove or rename one.")
    return paths[0]


def _listed_stems(file: Path, images: dict[str, list[Path]]) -> list[str]:
    stems = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        choices = (name, _LINE.fullmatch(name)[1], Path(name).stem)
        stem = next((choice for choice in choices if choice in images), None)
        if stem is None:
            raise DataError(
                f"{file} line {number} names {name}, but there is no image of that name: add it or "
                "remove the line."
            )
        stems.append(stem)
    return stems


_TURNED = Remark(
    "images whose boxes belong to the picture before its EXIF orientation is applied",
    "turned with it",
)

_FROM_ZERO = Remark(
    "images with a box at pixel 0, though VOC counts from 1",
    "add --zero-based if the tool that wrote them counts from 0",
)

_DIFFICULT = Remark(
    "images with objects marked as difficult",
    "written as crowd regions, neither learned nor counted (--keep-difficult: as others)",
)


_TURNED_MASKS = Remark(
    "images with an EXIF orientation and a mask file, which may be turned or not",
    "left without masks: save the images upright",
)

_ASTRAY = Remark(
    "images with masks that fit no box, or one that has a mask",
    "these masks are left out",
)

_BORDER = 255  # in VOC's mask files, pixels between objects
_FITS = 0.5  # IoU of the box of an object with the one around its mask


def read_voc_labels(path: Path, size: ImageSize, rules: VocRules) -> Labels:
    """Reads the boxes of an image, and their masks where SegmentationObject has some.

    Raises:
        DataError: if a file cannot be read, lacks something, or is about an image of another size.
    """
    root = _parse(path)
    turned = _is_of_stored_pixels(root, size, path)
    boxes, remarks = [], [_TURNED] if turned else []
    for number, element in enumerate(root.iterfind("object"), start=1):
        where = f"{path} object {number}"
        name = (element.findtext("name") or "").strip()
        if not name:
            raise DataError(f"{where} has no name: add it.")
        xyxy = _corners(element, where)
        if not rules.zero_based:
            remarks += [_FROM_ZERO] if min(xyxy[:2]) < 1 else []
            xyxy = (xyxy[0] - 1, xyxy[1] - 1, xyxy[2], xyxy[3])
        crowd = not rules.keep_difficult and _is_difficult(element, where)
        remarks += [_DIFFICULT] if crowd else []
        boxes.append(LabeledBox(name, size.turned(xyxy) if turned else xyxy, crowd))
    file = path.parent.parent / "SegmentationObject" / f"{path.stem}.png"
    if path.parent.name == "Annotations" and file.is_file():
        masks, odd = _masks(file, size, [box.xyxy for box in boxes])
        boxes = [replace(box, mask=masks.get(index)) for index, box in enumerate(boxes)]
        remarks += odd
    return Labels(boxes, list(dict.fromkeys(remarks)))


def _masks(
    file: Path, size: ImageSize, boxes: list[XYXY]
) -> tuple[dict[int, dict[str, Any]], list[Remark]]:
    """Masks by the index of their object; the pixels of object n have the number n.

    Raises:
        DataError: if the file is no such image, or of another size.
    """
    reader = ImageReader(max_pixels=None)
    with reader.open(file, f"mask {file}", ("PNG",)) as image:
        if image.mode not in ("P", "L"):
            raise DataError(
                f"mask {file} has colors (mode {image.mode}) instead of numbers of objects: save "
                "it with a palette, as VOC does, or remove it."
            )
        numbers = np.asarray(image)
    if size.orientation != 1:
        return {}, [_TURNED_MASKS]
    if numbers.shape != (size.height, size.width):
        raise DataError(
            f"mask {file} has {numbers.shape[1]}x{numbers.shape[0]} pixels, but its image has "
            f"{size.width}x{size.height}: correct or remove it."
        )
    masks: dict[int, dict[str, Any]] = {}
    astray = False
    for number in np.unique(numbers).tolist():
        if number in (0, _BORDER):
            continue
        mask = mask_utils.encode(np.asfortranarray(numbers == number, dtype=np.uint8))
        x, y, width, height = mask_utils.toBbox(mask).tolist()
        own = torch.tensor([[x, y, x + width, y + height]])
        overlaps = box_iou(own, torch.tensor(boxes, dtype=own.dtype).reshape(-1, 4))[0]
        # Where a tool has numbered them otherwise, the boxes tell.
        in_order = number <= len(boxes) and overlaps[number - 1] >= _FITS
        index = number - 1 if in_order else int(overlaps.argmax()) if len(boxes) else -1
        if index < 0 or overlaps[index] < _FITS or index in masks:
            astray = True
            continue
        masks[index] = {"size": list(mask["size"]), "counts": mask["counts"].decode("ascii")}
    return masks, [_ASTRAY] if astray else []


def _parse(path: Path) -> ElementTree.Element:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): correct the path.") from error
    try:
        return ElementTree.fromstring(content)
    # A ValueError or LookupError is about the encoding that the file itself states.
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        if isinstance(error, ElementTree.ParseError) and _is_utf8(content):
            raise DataError(f"{path} is not valid xml ({error}): correct or remove it.") from error
        raise DataError(
            f"{path} cannot be read as xml ({error}) because of its encoding: save it as UTF-8, "
            "or state the encoding in the first line."
        ) from error


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_of_stored_pixels(root: ElementTree.Element, size: ImageSize, path: Path) -> bool:
    """Whether the boxes were drawn without the EXIF orientation; raises if on another image."""
    stated = (_integer(root, "size/width"), _integer(root, "size/height"))
    if stated == (size.width, size.height) or None in stated or 0 in stated:
        return False  # some tools write no size, or 0
    if size.lies_on_its_side and stated == (size.height, size.width):
        return True
    raise DataError(
        f"{path} is about an image of {stated[0]}x{stated[1]} pixels, but its image has "
        f"{size.width}x{size.height}: correct the size and the boxes, or restore the image."
    )


def _integer(element: ElementTree.Element, tag: str) -> int | None:
    text = element.findtext(tag)
    try:
        return None if text is None else round(float(text))
    except (ValueError, OverflowError):
        return None


def _corners(element: ElementTree.Element, where: str) -> XYXY:
    values = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        text = element.findtext(f"bndbox/{tag}")
        try:
            values.append(float(text or ""))
        except ValueError:
            values.append(math.nan)
        if not math.isfinite(values[-1]):
            raise DataError(f"{where} has no number as bndbox/{tag} ({text}): correct it.")
    return values[0], values[1], values[2], values[3]


def _is_difficult(element: ElementTree.Element, where: str) -> bool:
    text = (element.findtext("difficult") or "0").strip()
    if text not in ("0", "1"):
        raise DataError(f"{where} has difficult {text}: write 0 or 1.")
    return text == "1"
