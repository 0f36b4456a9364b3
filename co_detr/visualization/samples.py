"""A grid of training samples as the model gets them: after augmentation, with their boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from co_detr.visualization.fonts import save_figure
from co_detr.visualization.grid import Box, choose_colours, draw_boxes

_PER_ROW = 3


@dataclass(frozen=True)
class Sample:
    """An augmented image: `pixels` (H, W, 3) uint8 in RGB, `boxes` in its pixels."""

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
        mapped: `image` (3, H, W) uint8, `instances` with `gt_boxes` and `gt_classes`, `file_name`.
        image_format: "RGB" or "BGR", the order of the channels of `image`.
    """
    pixels = mapped["image"].permute(1, 2, 0).numpy()  # (3, H, W) -> (H, W, 3)
    if image_format == "BGR":
        pixels = pixels[:, :, ::-1]
    instances = mapped["instances"]
    boxes = [
        Box((x1, y1, x2 - x1, y2 - y1), class_names[number])
        for (x1, y1, x2, y2), number in zip(
            instances.gt_boxes.tensor.tolist(), instances.gt_classes.tolist(), strict=True
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
    colours = dict(zip(names, choose_colours(len(names)), strict=True))
    columns = min(_PER_ROW, len(samples))
    rows = -(-len(samples) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.8 * rows), squeeze=False, layout="constrained"
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, sample in zip(grid.flat, samples, strict=False):
        draw_boxes(axes, sample.pixels, sample.boxes, colours, sample.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=110)
    plt.close(figure)
