"""A data set in another layout: what is found on the disk, and how it becomes COCO format.

The layouts (`Layout`) find examples and read label files; `convert` reads all of them and makes
COCO's images, annotations and categories.
"""

from __future__ import annotations

import codecs
import json
import os
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from co_detr.data.coco import BoxChecker
from co_detr.data.coco_file import shortened
from co_detr.data.images import ImageReader, image_suffixes, name_of, orientation_of
from co_detr.errors import ConfigError, DataError
from co_detr.files import written_whole

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
XYXY = tuple[float, float, float, float]


@dataclass(frozen=True)
class Example:
    """An image file with its label file; None: it has none, and so no objects."""

    image: Path
    label: Path | None


@dataclass(frozen=True)
class ImageSize:
    """Attributes:
    width, height: of the upright image, in pixels.
    orientation: the EXIF orientation, from 1 (the stored pixels are upright) to 8.
    """

    width: int
    height: int
    orientation: int = 1

    @property
    def lies_on_its_side(self) -> bool:
        """Whether the stored pixels have width and height exchanged."""
        return self.orientation >= 5

    def turned(self, xyxy: XYXY) -> XYXY:
        """A box of the stored pixels, of an image that lies on its side, in the upright image."""
        x0, y0, x1, y1 = xyxy
        # Row and column change places; then one or both are counted from the other end.
        left, top, right, bottom = y0, x0, y1, x1
        if self.orientation in (6, 7):
            left, right = self.width - y1, self.width - y0
        if self.orientation in (7, 8):
            top, bottom = self.height - x1, self.height - x0
        return left, top, right, bottom


@dataclass(frozen=True)
class LabeledBox:
    """An object.

    Attributes:
        class_name: as in the data set.
        xyxy: in absolute pixels of the upright image; may reach out of it.
        crowd: a region that is neither learned nor counted in the evaluation.
        mask: as COCO writes it, polygons in absolute pixels or run lengths; None: there is none.
    """

    class_name: str
    xyxy: XYXY
    crowd: bool = False
    mask: list[list[float]] | dict[str, Any] | None = None


@dataclass(frozen=True)
class Remark:
    """Something odd about an image: what, in the plural, and what was done or can be done."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Labels:
    """What a label file says."""

    boxes: list[LabeledBox]
    remarks: list[Remark] = field(default_factory=list)


class Layout(Protocol):
    """A data set as it lies on disk.

    Attributes:
        splits: the examples of "train", "val" and "test", as far as there are such.
        class_names: in their order; None: those that occur, sorted.
        orphans: label files that belong to no image.
        notes: sentences about sets that were left out.
    """

    splits: dict[str, list[Example]]
    class_names: Sequence[str] | None
    orphans: list[Path]
    notes: list[str]

    def read(self, label: Path, size: ImageSize) -> Labels:
        """Reads a label file.

        Raises:
            DataError: in one sentence that names the file.
        """
        ...


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

    @property
    def has_masks(self) -> bool:
        """Whether some objects have one."""
        return any("segmentation" in annotation for annotation in self.content["annotations"])


_NO_LABEL_FILE = Remark("images without a label file", "taken as images without objects")
_CLIPPED = Remark("boxes that are partly outside their image", "clipped")
_ORIENTED = Remark(
    "files whose polygons have four points, as all of the data set have",
    "taken as oriented boxes, which are no masks",
)


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
    every = [entry for entries in read.values() for entry in entries]
    problems = [entry.problem for entry in every if entry.problem]
    if problems:
        more = f" (The first of {len(problems)} wrong files.)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)
    names = layout.class_names or sorted(
        {b.class_name for entry in every for b in entry.labels.boxes}
    )
    polygons = [b.mask for entry in every for b in entry.labels.boxes if isinstance(b.mask, list)]
    if all(len(points) == 8 for polygon in polygons for points in polygon):
        read = {split: list(map(_without_polygons, entries)) for split, entries in read.items()}
    return [_to_coco(split, entries, list(names)) for split, entries in read.items()]


@dataclass(frozen=True)
class _Read:
    """An example with its size and labels, or the sentence that says why there are none."""

    example: Example
    size: ImageSize = ImageSize(0, 0)
    labels: Labels = Labels([])
    problem: str = ""


def _without_polygons(entry: _Read) -> _Read:
    labels = entry.labels
    if not any(isinstance(box.mask, list) for box in labels.boxes):
        return entry
    boxes = [replace(box, mask=None) for box in labels.boxes]
    return replace(entry, labels=Labels(boxes, [*labels.remarks, _ORIENTED]))


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
    root = _common_folder(source.example.image for source in entries)
    remarks: dict[Remark, list[str]] = {}
    for source in entries:
        label = source.example.label
        for remark in source.labels.remarks if label else [_NO_LABEL_FILE]:
            remarks.setdefault(remark, []).append(str(label or source.example.image))
        image = {
            "id": len(content["images"]) + 1,
            "file_name": os.path.relpath(source.example.image, root).replace(os.sep, "/"),
            "width": source.size.width,
            "height": source.size.height,
        }
        content["images"].append(image)
        boxes = BoxChecker(str(label), "skip")
        for number, box in enumerate(source.labels.boxes, start=1):
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


def _annotation(number: int, box: LabeledBox, ids: dict[str, int], label: str) -> dict[str, Any]:
    if box.class_name not in ids:
        raise DataError(
            f"{label} has the class {box.class_name}, which is none of {shortened(ids)}: correct "
            "it, or add it to --classes."
        )
    x0, y0, x1, y1 = box.xyxy
    mask = {} if box.mask is None else {"segmentation": box.mask}
    return mask | {
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


def read_size(path: Path) -> ImageSize:
    """Reads the head of an image file; only images with an orientation are decoded.

    Raises:
        DataError: if the file is no image that can be read.
    """
    reader = ImageReader(max_pixels=None)  # a head fits into the memory
    with reader.open(path, name_of(path)) as image:
        orientation = orientation_of(image)
        size = image.size if orientation == 1 else reader.decode(image, name_of(path)).size
        return ImageSize(*size, orientation)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, or of a UTF-16 file with a byte order mark, without the mark.

    Raises:
        DataError: if it cannot be read, or is in another encoding.
    """
    try:
        content = path.read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path} is not UTF-8 (byte 0x{byte:02x}): save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): correct the path.") from error


def read_class_names(path: Path) -> list[str]:
    """One name per line.

    Raises:
        DataError: if the file cannot be read, or the names are not unique.
    """
    lines = [line.strip() for line in read_text(path).splitlines()]
    return unique_names([line for line in lines if line], path)


def unique_names(names: Sequence[str], source: Path) -> list[str]:
    """Raises a DataError if there are no names, or one occurs twice."""
    repeated = [name for index, name in enumerate(names) if name in names[:index]]
    if repeated:
        raise DataError(f"{source} has the class {repeated[0]} twice: make the names unique.")
    if not names:
        raise DataError(f"{source} names no classes: add them.")
    return list(names)


def image_files(folder: Path) -> list[Path]:
    """Image files of a folder and its subfolders, sorted; hidden ones are left out."""
    suffixes = image_suffixes()
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def first_folder(candidates: Iterable[Path]) -> Path | None:
    """The first that exists."""
    return next((path for path in candidates if path.is_dir()), None)


def places_of(entry: str, folders: Iterable[Path]) -> Iterator[Path]:
    """Where a path in a file may lead, the likeliest first.

    Lists and yaml files are written on other systems (backslashes) and machines: without the
    folders in front, which are not there, a path may be right. A last part that only says "images"
    is no trace of it.
    """
    path = entry.replace("\\", "/")
    folders = list(folders)
    yield from (folder / path for folder in folders)
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for start in range(len(parts)):
        if parts[start:] != ["images"] or start == 0:
            yield from (folder.joinpath(*parts[start:]) for folder in folders)


def find_splits(
    find: Callable[[str], list[Example] | None],
    expected: str,
    optional: Collection[str],
    notes: list[str],
) -> dict[str, list[Example]]:
    """Looks for train, val and test.

    Args:
        find: examples of a set; None: there is none.
        expected: where label files should be, for a message.
        optional: sets that are left out if something is wrong with where they are.
        notes: gets a sentence for each of those.

    Raises:
        DataError: if `find` does, or if no image of a set has a label file: the search must have
            failed. A test set need not have labels.
    """
    splits = {}
    for split in SPLITS:
        try:
            examples = find(split)
            if examples is None:
                continue
            _require_labels(split, examples, expected)
        except DataError as error:
            if split in optional:
                notes.append(f"the {split} set is left out: {error.sentence}")
                continue
            if split == "val":
                advice = "or add --val-fraction 0.2 to draw it from train"
                raise DataError(f"{error.sentence.rstrip('.')}, {advice}.") from error
            raise
        splits[split] = examples
    return splits


def _require_labels(split: str, examples: list[Example], expected: str) -> None:
    if not examples:
        raise DataError(f"the {split} set has no image: add images, or remove the set.")
    if split != "test" and all(example.label is None for example in examples):
        raise DataError(
            f"none of the {len(examples)} {split} images has a label file ({expected}, for "
            f"{examples[0].image}): put them there."
        )


def share_out(
    splits: dict[str, list[Example]], val_fraction: float | None, folder: Path
) -> dict[str, list[Example]]:
    """The splits with a val set, which is drawn from train where there is none.

    The same images are drawn each time.

    Raises:
        ConfigError: if `val_fraction` is missing, superfluous or leaves a set empty.
        DataError: if there is no train set.
    """
    if "train" not in splits:
        raise DataError(f"{folder} has no train set (only {', '.join(splits) or 'none'}): add it.")
    if "val" in splits:
        if val_fraction is not None:
            raise ConfigError(f"{folder} has a val set: leave --val-fraction out.")
        return splits
    if val_fraction is None:
        raise ConfigError(
            f"{folder} has no val set: add --val-fraction 0.2 to draw a fifth of the train images "
            "for it."
        )
    examples = splits["train"]
    count = round(val_fraction * len(examples)) if 0 < val_fraction < 1 else 0
    if not 0 < count < len(examples):
        raise ConfigError(
            f"--val-fraction {val_fraction} of {len(examples)} images leaves a set empty: choose "
            "another."
        )
    drawn = set(random.Random(0).sample(range(len(examples)), count))
    train = [example for index, example in enumerate(examples) if index not in drawn]
    val = [example for index, example in enumerate(examples) if index in drawn]
    return {**splits, "train": train, "val": val}
