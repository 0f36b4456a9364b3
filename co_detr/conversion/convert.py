"""Reads a data set in another layout and writes it in COCO format."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from co_detr.conversion.image_size import ImageSize, read_size
from co_detr.conversion.structures import Example, LabelledBox, Labels, Layout, Remark
from co_detr.data.boxes import BoxChecker
from co_detr.data.coco_file import shortened
from co_detr.errors import DataError
from co_detr.files import written_whole

_NO_LABEL_FILE = Remark("images without a label file", "taken as images without objects")
_CLIPPED = Remark("boxes that are partly outside their image", "clipped")


@dataclass(frozen=True)
class ConvertedSplit:
    """A set in COCO format.

    Attributes:
        name: "train", "val" or "test".
        image_root: folder that the file names are relative to.
        content: `images`, `annotations` and `categories`.
        remarks: with the cases of each.
    """

    name: str
    image_root: Path
    content: dict[str, list[dict[str, Any]]]
    remarks: dict[Remark, list[str]]


@dataclass(frozen=True)
class _Read:
    """An example with its size and labels, or the sentence that says why there are none."""

    example: Example
    size: ImageSize = ImageSize(0, 0)
    labels: Labels = Labels([])
    problem: str = ""


def convert(splits: dict[str, list[Example]], layout: Layout) -> list[ConvertedSplit]:
    """Reads all images and label files.

    Args:
        splits: the examples of each set; those of `layout`, or shared out anew.

    Returns:
        One per set, all with the same categories, numbered from 1 in the order of the classes.

    Raises:
        DataError: for the first file that is wrong, with the number of the others.
    """
    read = {split: list(_read_all(examples, layout, split)) for split, examples in splits.items()}
    every = [each for entries in read.values() for each in entries]
    problems = [each.problem for each in every if each.problem]
    if problems:
        more = f" (The first of {len(problems)} wrong files.)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)
    names = layout.class_names or sorted(
        {b.class_name for each in every for b in each.labels.boxes}
    )
    return [_to_coco(split, entries, list(names)) for split, entries in read.items()]


def save(split: ConvertedSplit, path: Path) -> None:
    """Writes the json, whole or not at all.

    Raises:
        DataError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(str(path)) as file:
            json.dump(split.content, file)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): name another.") from error


def _read_all(examples: list[Example], layout: Layout, split: str) -> Iterator[_Read]:
    def read(example: Example) -> _Read:
        try:
            size = read_size(example.image)
            labels = layout.read(example.label, size) if example.label else Labels([])
        except DataError as error:
            return _Read(example, problem=error.sentence)
        return _Read(example, size, labels)

    # Most of the time is waiting for the disk.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from tqdm(pool.map(read, examples), f"reading {split}", len(examples), leave=False)


def _to_coco(split: str, entries: list[_Read], class_names: list[str]) -> ConvertedSplit:
    ids = {name: index for index, name in enumerate(class_names, start=1)}
    categories = [{"id": index, "name": name} for name, index in ids.items()]
    content: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": categories,
    }
    root = _common_folder(each.example.image for each in entries)
    remarks: dict[Remark, list[str]] = {}
    for each in entries:
        label = each.example.label
        for remark in each.labels.remarks if label else [_NO_LABEL_FILE]:
            remarks.setdefault(remark, []).append(str(label or each.example.image))
        image = {
            "id": len(content["images"]) + 1,
            "file_name": os.path.relpath(each.example.image, root).replace(os.sep, "/"),
            "width": each.size.width,
            "height": each.size.height,
        }
        content["images"].append(image)
        boxes = BoxChecker(str(label), "skip")
        for number, box in enumerate(each.labels.boxes, start=1):
            entry = _annotation(number, box, ids, str(label)) | {"image_id": image["id"]}
            bbox = boxes.clip(entry, image)
            if bbox is not None:
                entry |= {"id": len(content["annotations"]) + 1, "bbox": bbox}
                content["annotations"].append(entry | {"area": bbox[2] * bbox[3]})
        for where in boxes.clipped:
            remarks.setdefault(_CLIPPED, []).append(where)
        for skipped in boxes.skipped:
            remark = Remark(f"boxes that {skipped.kind}", "left out")
            remarks.setdefault(remark, []).append(skipped.where)
    return ConvertedSplit(split, root, content, remarks)


def _annotation(number: int, box: LabelledBox, ids: dict[str, int], label: str) -> dict[str, Any]:
    if box.class_name not in ids:
        raise DataError(
            f"{label} has the class {box.class_name}, which is none of {shortened(ids)}: correct "
            "it, or add it to --classes."
        )
    x0, y0, x1, y1 = box.xyxy
    return {
        "id": number,
        "category_id": ids[box.class_name],
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "iscrowd": int(box.crowd),
    }


def _common_folder(images: Iterable[Path]) -> Path:
    folders = {image.parent for image in images}
    if any(folder.is_absolute() for folder in folders):
        folders = {folder.absolute() for folder in folders}
    return Path(os.path.commonpath(folders))
