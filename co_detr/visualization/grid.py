"""A grid of images with the predictions beside the ground truth."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # works without a display

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from co_detr.data.coco_file import display_names, is_box, read_coco
from co_detr.data.image_files import locate_files
from co_detr.data.images import ImageReader
from co_detr.visualization.fonts import save_figure

_PAIRS_PER_ROW = 3
# Ten hues that show on light, dark and grey ground alike, under white text.
_TEN_COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#ff4fd8", "#b8860b", "#6b8e00", "#17becf"),
)


@dataclass(frozen=True)
class Box:
    """A box to draw: `xywh` in absolute pixels, `score` in [0, 1] or None for the ground truth."""

    xywh: tuple[float, float, float, float]
    class_name: str
    score: float | None = None


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
    predictions = _read_json(results, "evaluate first: train_net.py --eval-only writes it")
    if not coco.images:
        raise ValueError(f"{annotations} lists no images; there is nothing to draw.")
    if not isinstance(predictions, list):
        raise ValueError(f"{results} is not in COCO's result format: it must hold a list.")
    names = display_names(coco.categories)
    if not names:  # a test set: its detections are numbered as the model's classes
        numbers = sorted({entry["category_id"] for entry in predictions})
        names = {number: f"class {number}" for number in numbers}
    known = {image["id"] for image in coco.images}

    truth: dict[int, list[Box]] = defaultdict(list)
    for entry in filter(lambda each: is_box(each.get("bbox")), coco.annotations):
        truth[entry["image_id"]].append(_to_box(entry, names, annotations))
    found: dict[int, list[Box]] = defaultdict(list)
    for entry in predictions:
        if entry["image_id"] not in known:
            raise ValueError(
                f"{results} has a prediction for image {entry['image_id']}, which {annotations} "
                "does not list; give the annotation file that the run was evaluated on."
            )
        if entry["score"] >= score_threshold:
            found[entry["image_id"]].append(_to_box(entry, names, results))

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
        images.append(AnnotatedImage(path, truth[image["id"]], found[image["id"]]))
    return images


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
    colours = dict(zip(names, choose_colours(len(names)), strict=True))
    columns = min(_PAIRS_PER_ROW, len(images))
    rows = -(-len(images) // columns)
    figure, grid = plt.subplots(
        rows,
        2 * columns,
        figsize=(5.2 * columns, 2.75 * rows),
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat:
        axes.axis("off")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        pixels = reader.read_rgb(image.path)
        left, right = grid[row, 2 * column], grid[row, 2 * column + 1]
        draw_boxes(left, pixels, image.truth, colours, f"{image.path.name}: ground truth")
        draw_boxes(right, pixels, image.predictions, colours, "predictions")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=110)
    plt.close(figure)


def choose_colours(count: int) -> list[Any]:
    """One colour per class; the first ten show on any ground."""
    if count <= len(_TEN_COLOURS):
        return list(_TEN_COLOURS[:count])
    return [plt.get_cmap("gist_rainbow")(index / count) for index in range(count)]


def draw_boxes(
    axes: Axes, pixels: np.ndarray, boxes: list[Box], colours: dict[str, Any], title: str
) -> None:
    """Shows an image (H, W, 3) with boxes in the colours of their class names."""
    axes.imshow(pixels)
    axes.set_title(title, fontsize=8, parse_math=False)
    height, width = pixels.shape[:2]
    # The best predictions are drawn last, on top of the others.
    for box in sorted(boxes, key=lambda box: box.score or 0.0):
        x, y, box_width, box_height = box.xywh
        colour = colours[box.class_name]
        # Pixel i covers [i - 0.5, i + 0.5] in the picture but [i, i + 1] in box coordinates.
        corner = (x - 0.5, y - 0.5)
        axes.add_patch(
            Rectangle(corner, box_width, box_height, fill=False, edgecolor=colour, linewidth=1.5)
        )
        label = box.class_name if box.score is None else f"{box.class_name} {box.score:.2f}"
        axes.text(  # names are no formulas, though they may hold dollars
            min(max(x, 0), width - 1),
            max(y - 1, 0.06 * height),
            label,
            fontsize=6.5,
            parse_math=False,
            color="white",
            verticalalignment="bottom",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8},
        )
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)


def _to_box(entry: dict[str, Any], names: dict[int, str], source: Path) -> Box:
    category = entry["category_id"]
    if category not in names:
        raise ValueError(
            f"{source} uses category {category}, which the annotation file does not define; "
            "give the annotation file that the run was evaluated on."
        )
    return Box(tuple(entry["bbox"]), names[category], entry.get("score"))


def _read_json(path: Path, mend: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {mend}.")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {mend}.") from error
