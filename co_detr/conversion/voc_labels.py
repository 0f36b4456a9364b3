"""VOC label files: an xml file per image."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from co_detr.conversion.image_size import XYXY, ImageSize
from co_detr.conversion.structures import LabelledBox, Labels, Remark
from co_detr.errors import DataError

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


def read_voc_labels(path: Path, size: ImageSize, rules: VocRules) -> Labels:
    """Reads the boxes of an image.

    Raises:
        DataError: if the file is no xml, lacks something, or is about an image of another size.
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
        boxes.append(LabelledBox(name, size.turned(xyxy) if turned else xyxy, crowd))
    return Labels(boxes, list(dict.fromkeys(remarks)))


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
