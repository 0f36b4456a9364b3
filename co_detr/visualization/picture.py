"""Boxes drawn on one image, pixel by pixel: the picture keeps the size of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw

from co_detr.visualization.fonts import PictureFont
from co_detr.visualization.grid import Box, choose_colours

Colour = tuple[int, int, int]

_BRIGHT = 0.179  # relative luminance from which black text has more contrast than white


def class_colours(class_names: Sequence[str]) -> dict[str, Colour]:
    """A fixed colour for each class, so that it has the same one in all pictures."""
    colours = [tuple(round(255 * part) for part in to_rgb(c)) for c in _spread(len(class_names))]
    return dict(zip(class_names, colours, strict=True))


def text_colour(ground: Colour) -> str:
    """ "black" or "white", whichever is easier to read on the colour `ground`."""
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4  # sRGB to linear
        for part in (value / 255 for value in ground)
    )
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > _BRIGHT else "white"


def draw_picture(rgb: np.ndarray, boxes: Sequence[Box], colours: dict[str, Colour]) -> Image.Image:
    """Draws boxes with class and score; lines and text grow with the image.

    Args:
        rgb: ``(H, W, 3)`` uint8.
        boxes: in pixels of the image.
        colours: of all classes; see `class_colours`.
    """
    picture = Image.fromarray(rgb)
    draw = ImageDraw.Draw(picture)
    shorter = min(picture.size)
    width = max(1, round(shorter / 250))
    font = PictureFont(max(11, round(shorter / 40)))
    ranked = sorted(boxes, key=lambda box: box.score or 0.0)
    # The best ones are drawn last, on top of the others, and all labels on top of all frames.
    for box in ranked:
        left, top, right, bottom = _corners(box)
        draw.rectangle(
            (left, top, max(left, right - 1), max(top, bottom - 1)),
            outline=colours[box.class_name],
            width=width,
        )
    for box in ranked:
        _label(draw, box, colours[box.class_name], font, picture.size)
    return picture


def _label(
    draw: ImageDraw.ImageDraw,
    box: Box,
    colour: Colour,
    font: PictureFont,
    size: tuple[int, int],
) -> None:
    """Writes above the box, or inside at its top where there is no room above."""
    text = box.class_name if box.score is None else f"{box.class_name} {box.score:.2f}"
    left, top, _, _ = _corners(box)
    height = font.height
    width = round(font.length(text)) + 4
    x = max(0, min(left, size[0] - width))
    y = top - height if top >= height else max(0, top)
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    font.draw(draw, (x + 2, y), text, text_colour(colour))


def _corners(box: Box) -> tuple[int, int, int, int]:
    x, y, width, height = box.xywh
    return round(x), round(y), round(x + width), round(y + height)


def _spread(count: int) -> list[Any]:
    """`choose_colours`, a long list of them in an order in which neighbours differ."""
    colours = choose_colours(count)
    if count <= 10:
        return colours
    # Steps of a golden section, without common divisor with the length: each colour comes once.
    start = round(0.618 * count)
    step = next(step for step in range(start, count + start) if math.gcd(step, count) == 1)
    return [colours[index * step % count] for index in range(count)]
