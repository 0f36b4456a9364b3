"""Boxes and masks on images: one picture, predictions beside the truth, training samples.

`draw_picture` writes pixel by pixel and keeps the size of the image; the two grids are Matplotlib
figures. All of them take the colors of `choose_colors`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pycocotools.mask as mask_utils
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw
from scipy.ndimage import minimum_filter

from co_detr.data.coco_file import (
    Entry,
    display_names,
    is_box,
    locate_files,
    read_coco,
    read_json,
)
from co_detr.data.images import ImageReader, as_rgb
from co_detr.data.segmentation import encoded_mask
from co_detr.mask_patch import MaskPatch
from co_detr.structures import bitmaps_of
from co_detr.tools.draw.fonts import PictureFont, save_figure

matplotlib.use("Agg")  # works without a display

Color = tuple[int, int, int]
_PER_ROW = 3  # images, or pairs of images, of a grid
_MASK_OPACITY = 0.4
_BRIGHT = 0.179  # relative luminance from which black text has more contrast than white
# Ten hues that show on light, dark and gray ground alike, under white text.
_TEN_COLORS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#ff4fd8", "#b8860b", "#6b8e00", "#17becf"),
)


@dataclass(frozen=True)
class Box:
    """A box to draw.

    Attributes:
        xywh: in absolute pixels.
        class_name: which has a color.
        score: in [0, 1]; None for the ground truth.
        mask: of the object; None: there is none.
    """

    xywh: tuple[float, float, float, float]
    class_name: str
    score: float | None = None
    mask: MaskPatch | None = None

    @classmethod
    def of_corners(
        cls,
        xyxy: Sequence[float],
        class_name: str,
        score: float | None = None,
        mask: MaskPatch | None = None,
    ) -> Box:
        x0, y0, x1, y1 = xyxy
        return cls((x0, y0, x1 - x0, y1 - y0), class_name, score, mask)

    @property
    def label(self) -> str:
        return self.class_name if self.score is None else f"{self.class_name} {self.score:.2f}"


def choose_colors(count: int) -> list[Any]:
    """One color per class; the first ten show on any ground."""
    if count <= len(_TEN_COLORS):
        return list(_TEN_COLORS[:count])
    return [plt.get_cmap("gist_rainbow")(index / count) for index in range(count)]


def class_colors(class_names: Sequence[str]) -> dict[str, Color]:
    """A fixed color for each class, so that it has the same one in all pictures."""
    colors = map(_bytes_of, _spread(len(class_names)))
    return dict(zip(class_names, colors, strict=True))


def _spread(count: int) -> list[Any]:
    """`choose_colors`, a long list of them in an order in which neighbors differ."""
    colors = choose_colors(count)
    if count <= 10:
        return colors
    # Steps of a golden section, without common divisor with the length: each color comes once.
    start = round(0.618 * count)
    step = next(step for step in range(start, count + start) if math.gcd(step, count) == 1)
    return [colors[index * step % count] for index in range(count)]


def text_color(ground: Color) -> str:
    """ "black" or "white", whichever is easier to read on the color `ground`."""
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4  # sRGB to linear
        for part in (value / 255 for value in ground)
    )
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > _BRIGHT else "white"


def draw_picture(rgb: np.ndarray, boxes: Sequence[Box], colors: dict[str, Color]) -> Image.Image:
    """Draws boxes with class and score; lines and text grow with the image.

    Args:
        rgb: ``(H, W, 3)`` uint8.
        boxes: in pixels of the image.
        colors: of all classes; see `class_colors`.
    """
    shorter = min(rgb.shape[:2])
    width = max(1, round(shorter / 250))
    picture = Image.fromarray(paint_masks(rgb, boxes, colors, width))
    draw = ImageDraw.Draw(picture)
    font = PictureFont(max(11, round(shorter / 40)))
    ranked = sorted(boxes, key=lambda box: box.score or 0.0)
    # The best ones are drawn last, on top of the others, and all labels on top of all frames.
    for box in ranked:
        left, top, right, bottom = _corners(box)
        draw.rectangle(
            (left, top, max(left, right - 1), max(top, bottom - 1)),
            outline=colors[box.class_name],
            width=width,
        )
    for box in ranked:
        _label(draw, box, colors[box.class_name], font, picture.size)
    return picture


def paint_masks(
    rgb: np.ndarray, boxes: Sequence[Box], colors: dict[str, Any], width: int = 1
) -> np.ndarray:
    """An image ``(H, W, 3)`` uint8 with the masks of boxes: a soft color and a firm contour.

    Only the surroundings of one object are in memory as a bitmap. torchvision's
    `draw_segmentation_masks` wants bitmaps of all, and has no contours.

    Args:
        boxes: in pixels of the image; those without a mask change nothing.
        colors: of all classes, as bytes or as Matplotlib knows them.
        width: of the contours in pixels.

    Returns:
        a copy, or the image itself if there are no masks.
    """
    masked = [box for box in boxes if box.mask is not None and box.mask.pixels.any()]
    painted = rgb.copy() if masked else rgb
    # Small objects last: they often lie in front of large ones.
    for box in sorted(masked, key=lambda box: -np.count_nonzero(box.mask.pixels)):
        pixels = box.mask.pixels
        region = painted[box.mask.window]
        color = np.array(_bytes_of(colors[box.class_name]), np.float32)
        soft = (1 - _MASK_OPACITY) * region[pixels] + _MASK_OPACITY * color
        region[pixels] = soft.round().astype(np.uint8)
        inside = minimum_filter(pixels, size=2 * width + 1, mode="constant", cval=0)
        region[pixels & ~inside] = color
    return painted


def _bytes_of(color: Any) -> Color:
    if isinstance(color, tuple) and all(isinstance(part, int) for part in color):
        return color
    return tuple(round(255 * part) for part in to_rgb(color))


def _label(
    draw: ImageDraw.ImageDraw,
    box: Box,
    color: Color,
    font: PictureFont,
    size: tuple[int, int],
) -> None:
    """Writes above the box, or inside at its top where there is no room above."""
    left, top, _, _ = _corners(box)
    height = font.height
    width = round(font.length(box.label)) + 4
    x = max(0, min(left, size[0] - width))
    y = top - height if top >= height else max(0, top)
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
    font.draw(draw, (x + 2, y), box.label, text_color(color))


def _corners(box: Box) -> tuple[int, int, int, int]:
    x, y, width, height = box.xywh
    return round(x), round(y), round(x + width), round(y + height)


@dataclass(frozen=True)
class AnnotatedImage:
    """An image file with its ground truth and its predictions."""

    path: Path
    truth: list[Box] = field(default_factory=list)
    predictions: list[Box] = field(default_factory=list)


def load_images(
    annotations: Path, image_dir: Path, results: Path, *, score_threshold: float, count: int
) -> list[AnnotatedImage]:
    """Joins a COCO annotation file with predictions in COCO's result format.

    Args:
        score_threshold: predictions below it are left out.
        count: number of images, taken at equal distances from the annotation file.

    Raises:
        FileNotFoundError: one of the files does not exist.
        ValueError: a file has another format, or the two do not belong together (a DataError, if
            it is the annotation file).
    """
    coco = read_coco(str(annotations))
    if not results.is_file():
        raise FileNotFoundError(
            f"{results} does not exist; evaluate first: train_net.py --eval-only writes it."
        )
    predictions = read_json(str(results))
    if not coco.images:
        raise ValueError(f"{annotations} lists no images; there is nothing to draw.")
    if not isinstance(predictions, list):
        raise ValueError(f"{results} is not in COCO's result format: it must hold a list.")
    names = display_names(coco.categories)
    if not names:  # a test set: its detections are numbered as the model's classes
        numbers = sorted({entry["category_id"] for entry in predictions})
        names = {number: f"class {number}" for number in numbers}
    known = {image["id"] for image in coco.images}

    # Entries of the files by image; boxes and masks are made of those that are drawn.
    truth: dict[int | str, list[Entry]] = defaultdict(list)
    for entry in filter(lambda each: is_box(each.get("bbox")), coco.annotations):
        _require_category(entry, names, annotations)
        truth[entry["image_id"]].append(entry)
    found: dict[int | str, list[Entry]] = defaultdict(list)
    for entry in predictions:
        if entry["image_id"] not in known:
            raise ValueError(
                f"{results} has a prediction for image {entry['image_id']}, which {annotations} "
                "does not list; give the annotation file that the run was evaluated on."
            )
        if entry["score"] >= score_threshold:
            _require_category(entry, names, results)
            found[entry["image_id"]].append(entry)

    number = min(max(1, count), len(coco.images))
    chosen = np.linspace(0, len(coco.images) - 1, number).round().astype(int)
    located = locate_files((coco.images[index]["file_name"] for index in chosen), str(image_dir))
    images = []
    for index in chosen:
        image = coco.images[index]
        path = image_dir / located.paths.get(image["file_name"], image["file_name"])
        if not path.is_file():
            raise FileNotFoundError(
                f"The image {path} does not exist; check the image folder of {annotations}."
            )
        drawn = (
            [_to_box(entry, names, image) for entry in entries[image["id"]]]
            for entries in (truth, found)
        )
        images.append(AnnotatedImage(path, *drawn))
    return images


def _require_category(entry: Entry, names: Mapping[int | str, str], source: Path) -> None:
    category = entry["category_id"]
    if category not in names:
        raise ValueError(
            f"{source} uses category {category}, which the annotation file does not define; "
            "give the annotation file that the run was evaluated on."
        )


def _to_box(entry: Entry, names: Mapping[int | str, str], image: Entry) -> Box:
    """An entry of either file as a box of its image, with its mask."""
    size = image.get("height"), image.get("width")
    encoded = None if None in size else encoded_mask(entry.get("segmentation"), *size)
    mask = None
    if encoded is not None:
        mask = MaskPatch(0, 0, mask_utils.decode(encoded).astype(bool)).trimmed()
    return Box(tuple(entry["bbox"]), names[entry["category_id"]], entry.get("score"), mask)


def plot_predictions(
    images: list[AnnotatedImage], path: Path, reader: ImageReader | None = None
) -> None:
    """Writes a grid of pairs: the ground truth on the left, the predictions on the right.

    Raises:
        DataError: if an image cannot be read.
    """
    if not images:
        raise ValueError("plot_predictions needs at least one image, got none.")
    reader = reader or ImageReader()
    boxes = [box for image in images for box in image.truth + image.predictions]
    names = sorted({box.class_name for box in boxes})
    colors = dict(zip(names, choose_colors(len(names)), strict=True))
    figure, grid = _new_grid(len(images), (5.2, 2.75), axes_per_image=2)
    for image, (left, right) in zip(images, grid.reshape(-1, 2), strict=False):
        pixels = as_rgb(reader.read_rgb(image.path))
        draw_boxes(left, pixels, image.truth, colors, f"{image.path.name}: ground truth")
        draw_boxes(right, pixels, image.predictions, colors, "predictions")
    _write(figure, path)


@dataclass(frozen=True)
class Sample:
    """An augmented image: `pixels` (H, W, 3) uint8 in RGB, `boxes` in its pixels, with masks."""

    name: str
    pixels: np.ndarray
    boxes: list[Box]

    @property
    def title(self) -> str:
        height, width = self.pixels.shape[:2]
        count = len(self.boxes)
        return f"{self.name}: {width}x{height}, {count or 'no'} box{'es' * (count != 1)}"


def sample_of(mapped: dict[str, Any], class_names: Sequence[str], image_format: str) -> Sample:
    """Reads what a mapper made.

    Args:
        mapped: `image` (C, H, W) uint8, `instances` with `gt_boxes`, `gt_classes` and optionally
            `gt_masks`, `file_name`.
        image_format: "RGB" or "BGR", the order of the channels of `image`.
    """
    pixels = as_rgb(mapped["image"].permute(1, 2, 0).numpy())  # (C, H, W) -> (H, W, 3)
    if image_format == "BGR":
        pixels = pixels[:, :, ::-1]
    instances = mapped["instances"]
    masks: list[MaskPatch | None] = [None] * len(instances)
    if instances.has("gt_masks"):
        masks = [
            MaskPatch(0, 0, bitmap.numpy()).trimmed()
            for bitmap in bitmaps_of(instances.gt_masks, pixels.shape[:2])
        ]
    boxes = [
        Box.of_corners(corners, class_names[number], mask=mask)
        for corners, number, mask in zip(
            instances.gt_boxes.tensor.tolist(), instances.gt_classes.tolist(), masks, strict=True
        )
    ]
    return Sample(Path(mapped["file_name"]).name, pixels, boxes)


def plot_samples(samples: list[Sample], class_names: Sequence[str], path: Path) -> None:
    """Writes a grid of samples, three in a row; the titles tell their sizes in pixels.

    Raises:
        ValueError: if there are no samples.
    """
    if not samples:
        raise ValueError("plot_samples needs at least one sample, got none.")
    names = list(dict.fromkeys(class_names))
    colors = dict(zip(names, choose_colors(len(names)), strict=True))
    figure, grid = _new_grid(len(samples), (4.6, 3.8))
    for axes, sample in zip(grid.flat, samples, strict=False):
        draw_boxes(axes, sample.pixels, sample.boxes, colors, sample.title)
    _write(figure, path)


def _new_grid(
    number: int, inches: tuple[float, float], axes_per_image: int = 1
) -> tuple[Figure, np.ndarray]:
    """A figure for so many images of this (width, height), three in a row; the axes are off."""
    columns = min(_PER_ROW, number)
    rows = -(-number // columns)
    figure, grid = plt.subplots(
        rows,
        axes_per_image * columns,
        figsize=(inches[0] * columns, inches[1] * rows),
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat:
        axes.axis("off")
    return figure, grid


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=110)
    plt.close(figure)


def draw_boxes(
    axes: Axes, pixels: np.ndarray, boxes: list[Box], colors: dict[str, Any], title: str
) -> None:
    """Shows an image (H, W, 3) with boxes and masks in the colors of their class names."""
    axes.imshow(paint_masks(pixels, boxes, colors, max(2, min(pixels.shape[:2]) // 160)))
    axes.set_title(title, fontsize=8, parse_math=False)
    height, width = pixels.shape[:2]
    # The best predictions are drawn last, on top of the others.
    for box in sorted(boxes, key=lambda box: box.score or 0.0):
        x, y, box_width, box_height = box.xywh
        color = colors[box.class_name]
        # Pixel i covers [i - 0.5, i + 0.5] in the picture but [i, i + 1] in box coordinates.
        corner = (x - 0.5, y - 0.5)
        axes.add_patch(
            Rectangle(corner, box_width, box_height, fill=False, edgecolor=color, linewidth=1.5)
        )
        axes.text(  # names are no formulas, though they may hold dollars
            min(max(x, 0), width - 1),
            max(y - 1, 0.06 * height),
            box.label,
            fontsize=6.5,
            parse_math=False,
            color="white",
            verticalalignment="bottom",
            bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8},
        )
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
