"""Charts and pictures of the measures, readable in print and without telling red from green."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from co_detr.analysis.iof_iob import Curve
from co_detr.analysis.subject import Sample
from co_detr.tools.draw.fonts import PictureFont

# Okabe and Ito's colours without the yellow, which is faint on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_LINE_STYLES = ("-", "--", ":", "-.")
_FONT_SIZE = 11
_PANEL_WIDTH = 360
_GAP = 6


def line_style(index: int) -> dict[str, object]:
    """Colour and dash of the line of this index; dashes also tell lines apart in grey."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": _LINE_STYLES[index % len(_LINE_STYLES)],
        "linewidth": 1.8,
    }


def new_axes(width: float = 4.8, height: float = 4.4) -> tuple[Figure, Axes]:
    """A figure of its own, in inches, with a single plot without a box around it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_FONT_SIZE - 1)
    return figure, axes


def iof_iob_figure(curves: Mapping[str, Curve]) -> Figure:
    """IoF over IoB by label, with the area under each in the legend, and chance as a thin line."""
    figure, axes = new_axes()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    for index, (label, curve) in enumerate(curves.items()):
        axes.plot(curve.iob, curve.iof, label=f"{label} (AUC {curve.auc:.3f})", **line_style(index))
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_xlabel("IoB: share of background above threshold", fontsize=_FONT_SIZE)
    axes.set_ylabel("IoF: share of objects above threshold", fontsize=_FONT_SIZE)
    axes.legend(fontsize=_FONT_SIZE - 2, loc="lower right", frameon=False)
    return figure


def matrix_figure(names: Sequence[str], values: np.ndarray, label: str) -> Figure:
    """A square matrix ``(N, N)`` as a heat map with its numbers; ``label`` names the quantity."""
    side = 2.4 + 0.7 * len(names)
    figure, axes = new_axes(side + 0.8, side)
    drawn = axes.imshow(values, cmap="cividis", vmin=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    middle = values.max() / 2
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        colour = "black" if value > middle else "white"
        axes.text(
            column, row, f"{value:.4f}", ha="center", va="center", color=colour,
            fontsize=_FONT_SIZE - 2,
        )  # fmt: skip
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8)
    bar.set_label(label, fontsize=_FONT_SIZE)
    return figure


def heat_map(rgb: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Scores ``(H, W)`` as colours over an image ``(H, W, 3)``, from their lowest to their highest.

    Colours are relative, as the scores of one map often differ little.
    """
    low, high = float(scores.min()), float(scores.max())
    relative = (scores - low) / max(high - low, 1e-12)
    colours = colormaps["inferno"](relative)[..., :3] * 255
    # The image in grey, so that its own colours are not taken for scores.
    grey = rgb.mean(axis=-1, keepdims=True)
    return (0.35 * grey + 0.65 * colours).round().astype(np.uint8)


def pixels_of(sample: Sample, image_format: str) -> np.ndarray:
    """The image that the model reads, ``(H, W, 3)`` uint8 RGB."""
    pixels = sample.input["image"].permute(1, 2, 0).cpu().numpy()
    pixels = pixels.clip(0, 255).astype(np.uint8)
    return pixels[:, :, ::-1] if image_format == "BGR" else pixels


def side_by_side(panels: Mapping[str, np.ndarray], boxes: np.ndarray) -> np.ndarray:
    """Images of one size in a row, each with its title above and the boxes ``(G, 4)`` in it.

    Small images are enlarged by a whole number.
    """
    height, width = next(iter(panels.values())).shape[:2]
    factor = max(1, math.ceil(_PANEL_WIDTH / width))
    height, width = height * factor, width * factor
    font = PictureFont(max(15, width // 24))
    title_height = font.height + 4
    row = Image.new("RGB", ((width + _GAP) * len(panels) - _GAP, height + title_height), "white")
    draw = ImageDraw.Draw(row)
    for index, (title, image) in enumerate(panels.items()):
        left = index * (width + _GAP)
        panel = Image.fromarray(np.ascontiguousarray(image)).resize((width, height))
        _outline(panel, boxes * factor)
        row.paste(panel, (left, title_height))
        font.draw(draw, (left + (width - font.length(title)) / 2, 2), title, "black")
    return np.asarray(row)


def _outline(panel: Image.Image, boxes: np.ndarray) -> None:
    """White frames with a dark rim, which show on any ground."""
    draw = ImageDraw.Draw(panel)
    width = max(1, min(panel.size) // 200)
    for left, top, right, bottom in boxes.round().astype(int).tolist():
        right, bottom = max(left, right - 1), max(top, bottom - 1)
        draw.rectangle((left, top, right, bottom), outline="black", width=width + 2)
        inner = (left + 1, top + 1, max(left + 1, right - 1), max(top + 1, bottom - 1))
        draw.rectangle(inner, outline="white", width=width)
