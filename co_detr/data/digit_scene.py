"""Drawing of one quick-start image: handwritten digits pasted on a crop of a photograph.

Everything random comes from the `numpy.random.Generator` that is passed in, so a scene depends on
its generator alone. Boxes are absolute xyxy pixels, x2 and y2 exclusive.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from PIL import Image

ALPHA_VISIBLE = 128
"""A pixel of the mask belongs to the digit, and to its box, from this opacity (0-255) on."""

_CANVAS = 192  # glyphs are bent at this size and only then brought to their final one
_LUMINANCE = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Glyph:
    """One handwritten digit: `pixels` (8, 8) ink in [0, 16], its class, its row in the source."""

    pixels: np.ndarray
    label: int
    index: int


@dataclass(frozen=True)
class Photograph:
    """A background: `pixels` (H, W, 3) uint8 RGB."""

    name: str
    pixels: np.ndarray


@dataclass(frozen=True)
class SceneConfig:
    """What a scene looks like. Lengths in pixels, angles in degrees, ranges inclusive.

    Attributes:
        image_side: range of the image's width and of its height, drawn separately, so that
            batches need padding.
        digits: range of the number of digits tried; one that finds no room is left out.
        digit_side: range of the longer side of a digit's box.
        max_rotation: rotation to either side; small enough to keep 6 and 9 apart.
        max_shear: horizontal shear to either side.
        max_overlap: largest part of the smaller of two boxes that the other may cover. 0.15
            keeps their IoU below 0.09.
        min_contrast: least difference of luminance (0-255) between digit and background.
    """

    image_side: tuple[int, int] = (144, 192)
    digits: tuple[int, int] = (2, 7)
    digit_side: tuple[int, int] = (24, 64)
    max_rotation: float = 20.0
    max_shear: float = 0.2
    max_overlap: float = 0.15
    min_contrast: float = 80.0

    def __post_init__(self) -> None:
        for name in ("image_side", "digits", "digit_side"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} must be a range 1 <= low <= high, got ({low}, {high}).")
        if self.digit_side[1] > self.image_side[0]:
            raise ValueError(
                f"digit_side goes up to {self.digit_side[1]} px but the smallest image has "
                f"{self.image_side[0]} px; lower digit_side or raise image_side."
            )


@dataclass(frozen=True)
class PlacedDigit:
    """A digit in a scene: `box` (x1, y1, x2, y2) is the tight box of its visible mask."""

    box: tuple[int, int, int, int]
    glyph: Glyph


@dataclass(frozen=True)
class Scene:
    """A finished image, `pixels` (H, W, 3) uint8 RGB, with the digits on it."""

    pixels: np.ndarray
    digits: list[PlacedDigit]
    photograph: str


def draw_scene(
    glyphs: list[Glyph],
    photographs: list[Photograph],
    config: SceneConfig,
    rng: np.random.Generator,
) -> Scene:
    """Draws one scene from the given glyphs and photographs; it holds at least one digit."""
    photograph = photographs[rng.integers(len(photographs))]
    width, height = (int(n) for n in rng.integers(*config.image_side, size=2, endpoint=True))
    pixels = crop_background(photograph, width, height, rng)

    placed: list[PlacedDigit] = []
    for _ in range(rng.integers(*config.digits, endpoint=True)):
        glyph = glyphs[rng.integers(len(glyphs))]
        side = int(rng.integers(*config.digit_side, endpoint=True))
        alpha = render_alpha(glyph, side, config, rng)
        box = _find_room(alpha.shape, width, height, placed, config, rng)
        if box is None:
            continue
        _paste(pixels, alpha, box, config, rng)
        placed.append(PlacedDigit(box, glyph))
    return Scene(pixels.round().astype(np.uint8), placed, photograph.name)


def crop_background(
    photograph: Photograph, width: int, height: int, rng: np.random.Generator
) -> np.ndarray:
    """Cuts a random, randomly mirrored crop at 1 to 2 times the size and shrinks it.

    Returns:
        (height, width, 3) float64 in [0, 255].
    """
    full_height, full_width = photograph.pixels.shape[:2]
    zoom = min(rng.uniform(1.0, 2.0), full_width / width, full_height / height)
    crop_width, crop_height = int(width * zoom), int(height * zoom)
    left = int(rng.integers(0, full_width - crop_width, endpoint=True))
    top = int(rng.integers(0, full_height - crop_height, endpoint=True))
    crop = photograph.pixels[top : top + crop_height, left : left + crop_width]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    resized = Image.fromarray(np.ascontiguousarray(crop)).resize((width, height), Image.LANCZOS)
    return np.asarray(resized, dtype=np.float64)


def render_alpha(
    glyph: Glyph, side: int, config: SceneConfig, rng: np.random.Generator
) -> np.ndarray:
    """Turns the 8 x 8 ink into an anti-aliased, rotated and sheared mask.

    Returns:
        (h, w) uint8 opacity with max(h, w) == side, cut so that its first and last row and column
        each hold a visible pixel.
    """
    angle = np.deg2rad(rng.uniform(-config.max_rotation, config.max_rotation))
    shear = rng.uniform(-config.max_shear, config.max_shear)
    # The margin leaves room for the corners.
    ink = Image.fromarray(np.pad(glyph.pixels, 3).astype(np.float32))
    ink = ink.resize((_CANVAS, _CANVAS), Image.BICUBIC)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = rotation @ np.array([[1.0, shear], [0.0, 1.0]])
    centre = np.full(2, _CANVAS / 2)
    offset = centre - matrix @ centre
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    bent = np.asarray(ink.transform(ink.size, Image.AFFINE, coefficients, Image.BICUBIC))
    # Half of the full ink, 16, is where the pen's edge was; a lower threshold would close the
    # holes of 6, 8 and 9.
    stroke = np.clip((bent - 6.5) / 3.0, 0.0, 1.0) * 255.0

    stroke = _cut_to_visible(stroke)
    factor = side / max(stroke.shape)
    size = [max(1, round(n * factor)) for n in reversed(stroke.shape)]
    small = Image.fromarray(stroke.astype(np.float32)).resize(size, Image.BOX)
    return _cut_to_visible(np.clip(np.asarray(small), 0, 255).round()).astype(np.uint8)


def _cut_to_visible(alpha: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(alpha >= ALPHA_VISIBLE)
    return alpha[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def _find_room(
    shape: tuple[int, int],
    width: int,
    height: int,
    placed: list[PlacedDigit],
    config: SceneConfig,
    rng: np.random.Generator,
    attempts: int = 40,
) -> tuple[int, int, int, int] | None:
    """Looks for a place inside the image that covers no other digit too much."""
    box_height, box_width = shape
    for _ in range(attempts):
        left = int(rng.integers(0, width - box_width, endpoint=True))
        top = int(rng.integers(0, height - box_height, endpoint=True))
        box = (left, top, left + box_width, top + box_height)
        if all(overlap_of_smaller(box, other.box) <= config.max_overlap for other in placed):
            return box
    return None


def overlap_of_smaller(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection of two xyxy boxes over the area of the smaller one, in [0, 1]."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return width * height / min(area_a, area_b)


def _paste(
    pixels: np.ndarray,
    alpha: np.ndarray,
    box: tuple[int, int, int, int],
    config: SceneConfig,
    rng: np.random.Generator,
) -> None:
    """Blends a tinted digit into `pixels` in place."""
    x1, y1, x2, y2 = box
    under = pixels[y1:y2, x1:x2]
    weight = alpha[..., None] / 255.0
    luminance = float((under @ _LUMINANCE * weight[..., 0]).sum() / weight.sum())
    under += (_choose_tint(luminance, config, rng) - under) * weight


def _choose_tint(
    background: float, config: SceneConfig, rng: np.random.Generator, attempts: int = 50
) -> np.ndarray:
    """Draws an RGB colour (3,) in [0, 255] whose luminance stands off the background's."""
    for _ in range(attempts):
        # Even in lightness (HSV would be mostly dark), so light and dark digits are as common.
        hue, lightness, saturation = rng.random(), rng.random(), rng.uniform(0.3, 1.0)
        tint = 255.0 * np.array(colorsys.hls_to_rgb(hue, lightness, saturation))
        if abs(tint @ _LUMINANCE - background) >= config.min_contrast:
            return tint
    return np.full(3, 0.0 if background > 127.5 else 255.0)
