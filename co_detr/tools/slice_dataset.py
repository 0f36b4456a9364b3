"""Cuts the images of a COCO-format file into tiles, with what is seen of each object in them.

Training on tiles shows small objects of large images at the size at which they are predicted with
``--tiles``. A part of an object of which too little is seen is no object to learn: it becomes a
crowd region, which is neither learned nor counted in an evaluation.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pycocotools.mask as mask_utils
from PIL import Image
from tqdm import tqdm

from co_detr.data.coco_file import Entry, enclosing_box, read_coco
from co_detr.data.images import ImageReader
from co_detr.data.segmentation import encoded_mask
from co_detr.errors import ConfigError, DataError
from co_detr.tools.split_dataset import write_json

if TYPE_CHECKING:
    from co_detr.data.coco import BoxChecker
    from co_detr.engine.views import Tiles

EPILOG = """
example:
  python tools/slice_dataset.py my/train.json --images my/images --output my/tiles --size 640

Writes DIR/train.json and its images below DIR/images. The exit status is 0, or 2 after an error
that is explained in one sentence.
"""
_JPEG_QUALITY = 95
_BOX = tuple[float, float, float, float]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of tools/slice_dataset.py."""
    parser = argparse.ArgumentParser(
        description="Cuts an annotated data set in COCO format into tiles.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("annotations", type=Path, metavar="FILE", help="COCO-format file")
    add("--images", type=Path, required=True, metavar="DIR", help="folder of its images")
    add("--output", type=Path, required=True, metavar="DIR", help="where the tiles go")
    add("--size", type=int, default=640, metavar="N", help="side in pixels (default: 640)")
    add("--overlap", type=float, default=0.2, metavar="P", help="least, a share (default: 0.2)")
    add(
        "--min-visible",
        type=float,
        default=0.4,
        metavar="P",
        help="share of an object that has to be in a tile to be learned there (default: 0.4)",
    )
    add("--without-empty", action="store_true", help="leave out tiles without anything in them")
    add("--force", action="store_true", help="replace files that are there")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Cuts, writes, and says what became of the objects.

    Raises:
        UserError: if an argument or the data set is wrong.
    """
    from co_detr.data.preflight import SplitFiles, preflight
    from co_detr.engine.views import Tiles

    if not 0 < options.min_visible <= 1:
        raise ConfigError(f"--min-visible {options.min_visible} must be above 0 and at most 1.")
    path = options.output / options.annotations.name
    if path.exists() and not options.force:
        raise ConfigError(f"{path} exists: choose another --output, or add --force.")
    # What a training would stop at, this stops at, too.
    preflight(
        [SplitFiles("train", str(options.annotations), str(options.images), masks=True)]
    ).raise_on_errors()
    sliced = slice_dataset(
        *(options.annotations, options.images, options.output / "images"),
        Tiles(options.size, options.overlap),
        options.min_visible,
        keep_empty=not options.without_empty,
    )
    write_json(sliced.content, path)
    print(sliced.report.text())
    print(f"Train on {path} with the images in {options.output / 'images'}.")


@dataclass
class Report:
    """What became of a data set; `incomplete` are objects that no tile shows enough of."""

    images: int = 0
    tiles: int = 0
    empty: int = 0
    objects: int = 0
    whole: int = 0
    parts: int = 0
    ignored: int = 0
    skipped: int = 0
    incomplete: list[str] = field(default_factory=list)

    def text(self) -> str:
        lines = [
            f"{self.images} images became {self.tiles} tiles ({self.empty} more were empty and "
            "left out).",
            f"{self.objects} objects became {self.whole} whole ones, {self.parts} parts that are "
            f"learned as objects, and {self.ignored} that are ignored as crowd regions.",
        ]
        if self.skipped:
            lines.append(f"{self.skipped} boxes without area in their image were left out.")
        if self.incomplete:
            lines.append(
                f"{len(self.incomplete)} objects are not to be learned in any tile, as all show "
                f"too little of them (the first: {self.incomplete[0]}): take larger tiles, more "
                "overlap, or a lower --min-visible."
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class SlicedDataset:
    """Attributes:
    content: of a COCO-format file; ``tile`` of an image says where it was cut from.
    report: of what happened.
    """

    content: dict[str, list[Entry]]
    report: Report


@dataclass(frozen=True)
class _Object:
    """An annotation in its image: the clipped corners, and the whole bitmap if there is a mask."""

    annotation: Entry
    corners: _BOX
    bitmap: np.ndarray | None

    @property
    def area(self) -> float:
        return _area(self.corners) if self.bitmap is None else float(self.bitmap.sum())

    def within(self, region: tuple[int, int, int, int]) -> tuple[Entry, float] | None:
        """``bbox``, ``area`` and ``segmentation`` in a tile, and the share that is seen."""
        left, top, right, bottom = region
        x1, y1, x2, y2 = self.corners
        seen = (max(x1, left), max(y1, top), min(x2, right), min(y2, bottom))
        if seen[0] >= seen[2] or seen[1] >= seen[3]:
            return None
        if self.bitmap is None:
            box = [seen[0] - left, seen[1] - top, seen[2] - seen[0], seen[3] - seen[1]]
            return {"bbox": box, "area": _area(seen)}, _area(seen) / self.area
        part = np.asfortranarray(self.bitmap[top:bottom, left:right])
        area = float(part.sum())
        if not area:
            return None
        encoded = mask_utils.encode(part)
        mask = {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
        changed = {"bbox": enclosing_box(mask), "area": area, "segmentation": mask}
        return changed, area / self.area


def slice_dataset(
    annotation_file: Path,
    images: Path,
    output: Path,
    tiles: Tiles,
    min_visible: float,
    keep_empty: bool = True,
) -> SlicedDataset:
    """Writes the tiles of all images, and returns their annotations.

    An object is whole in a tile, or a part. A part of at least `min_visible` of its area, that of
    the mask where there is one, is an object with the box of what is seen; of less, a crowd region.
    Crowd regions stay such. Masks become run lengths. Tiles of JPEG files are JPEG, others PNG.

    Args:
        images: folder that the file names are relative to.
        output: folder for the images.
        tiles: which regions; the full image is no tile.
        keep_empty: whether tiles without any annotation are kept.

    Raises:
        DataError: if an image or the file cannot be read. What else can be wrong with a file,
            `preflight` finds.
    """
    from co_detr.data.coco import BoxChecker

    content = read_coco(str(annotation_file))
    boxes = BoxChecker(str(annotation_file), "skip")
    by_image: dict[Any, list[Entry]] = {image["id"]: [] for image in content.images}
    for annotation in content.annotations:
        by_image[annotation["image_id"]].append(annotation)
    report = Report(images=len(content.images))
    entries: list[Entry] = []
    annotations: list[Entry] = []
    reader = ImageReader()
    for image in tqdm(content.images, unit="image"):
        pixels = reader.read_rgb(images / image["file_name"])
        height, width = pixels.shape[:2]
        if (image.get("width", width), image.get("height", height)) != (width, height):
            raise DataError(
                f"image {images / image['file_name']} is {width}x{height} but {annotation_file} "
                f"says {image['width']}x{image['height']}: write the true size."
            )
        record = image | {"width": width, "height": height}
        objects = list(_objects(by_image[image["id"]], record, boxes))
        learned = set()
        for region in tiles.regions((height, width)):
            found = list(_in_tile(objects, region, min_visible, report, learned))
            if not found and not keep_empty:
                report.empty += 1
                continue
            entry = _save_tile(pixels, record, region, output) | {"id": len(entries) + 1}
            entries.append(entry)
            for annotation in found:
                number = len(annotations) + 1
                annotations.append(annotation | {"id": number, "image_id": entry["id"]})
        to_learn = [index for index, one in enumerate(objects) if not one.annotation["iscrowd"]]
        report.objects += len(to_learn)
        for index in to_learn:
            if index not in learned:
                name = objects[index].annotation.get("id")
                report.incomplete.append(f"annotation {name!r} of {image['file_name']}")
    report.tiles, report.skipped = len(entries), len(boxes.skipped)
    lists = {"images": entries, "annotations": annotations, "categories": content.categories}
    return SlicedDataset(lists, report)


def _objects(annotations: list[Entry], record: Entry, boxes: BoxChecker) -> Iterator[_Object]:
    for annotation in annotations:
        box = boxes.clip(annotation, record)
        if box is None:
            continue
        x, y, width, height = box
        size = record["height"], record["width"]
        mask = encoded_mask(annotation.get("segmentation"), *size)
        bitmap = None if mask is None else mask_utils.decode(mask)
        if bitmap is not None and not bitmap.any():
            bitmap = None
        yield _Object(annotation, (x, y, x + width, y + height), bitmap)


def _in_tile(
    objects: list[_Object],
    region: tuple[int, int, int, int],
    min_visible: float,
    report: Report,
    learned: set[int],
) -> Iterator[Entry]:
    """Annotations of a tile; adds to `learned` the indices of objects that are some there."""
    for index, one in enumerate(objects):
        seen = one.within(region)
        if seen is None:
            continue
        changed, share = seen
        kept = {key: value for key, value in one.annotation.items() if key != "segmentation"}
        kept |= changed
        if not one.annotation["iscrowd"]:
            is_whole = share > 1 - 1e-6
            report.whole += is_whole
            report.parts += not is_whole and share >= min_visible
            report.ignored += share < min_visible
            kept["iscrowd"] = int(share < min_visible)
            if share >= min_visible:
                learned.add(index)
        yield kept


def _save_tile(
    pixels: np.ndarray, record: Entry, region: tuple[int, int, int, int], output: Path
) -> Entry:
    """Writes the picture of a tile; returns its entry without an id."""
    left, top, right, bottom = region
    source = Path(record["file_name"])
    is_jpeg = source.suffix.lower() in (".jpg", ".jpeg")
    name = source.with_name(f"{source.stem}_{left}_{top}{'.jpg' if is_jpeg else '.png'}")
    path = output / name
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": _JPEG_QUALITY} if is_jpeg else {}
    Image.fromarray(np.ascontiguousarray(pixels[top:bottom, left:right])).save(path, **options)
    tile = {"image_id": record["id"], "file_name": record["file_name"], "left": left, "top": top}
    return record | {
        "file_name": str(name),
        "width": right - left,
        "height": bottom - top,
        "tile": tile,
    }


def _area(corners: _BOX) -> float:
    return (corners[2] - corners[0]) * (corners[3] - corners[1])
