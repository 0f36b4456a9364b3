"""Variations of single training images: flips, quarter turns, colors, blur; and their transforms.

Detectron2's own rotation needs OpenCV and its color transforms are one pass over the image each;
here all changes of color are one linear map. Boxes and masks follow exactly: a quarter turn moves
every pixel to one other pixel, and colors move none.
"""

from __future__ import annotations

from dataclasses import dataclass

import detectron2.data.transforms as T
import numpy as np
from PIL import Image, ImageFilter

from co_detr.errors import ConfigError

_LUMA = np.array([0.299, 0.587, 0.114])  # of red, green and blue (ITU-R BT.601), as in Pillow
_MID_GRAY = 127.5
# Colors as brightness and two axes of hue (YIQ): hue turns the latter two.
_YIQ = np.array([_LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


@dataclass(frozen=True)
class Variation:
    """What a mapper does to training images beside its augmentations.

    Flips and turns come before these (images of all shapes are then resized as any other), colors
    and blur behind them, on the pixels that are left. What is 0 is not drawn for, so that with all
    zeros samples are those without.

    Args:
        vertical_flip: how often images are turned upside down as in a mirror.
        quarter_turns: how often they are turned by 90, 180 or 270 degrees. Aspect ratios of a batch
            then differ: ``dataloader.train.aspect_ratio_grouping=false`` says so.
        brightness, contrast, saturation: factors are drawn from 1 - x to 1 + x each, as of
            torchvision's ``ColorJitter``; contrast is that to middle gray, not to the image's mean.
        hue: colors are turned by up to so many turns of the color circle, from 0 to 0.5.
        blur: how often images are blurred.
        blur_sigma: (min, max) of the Gaussian in pixels of the augmented image.
        image_format: "RGB" or "BGR", the color order of the model.

    Raises:
        ConfigError: if a value is out of its range.
    """

    vertical_flip: float = 0.0
    quarter_turns: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    image_format: str = "RGB"

    def __post_init__(self) -> None:
        tops = {"hue": 0.5}
        for name in (
            *("vertical_flip", "quarter_turns", "brightness", "contrast", "saturation", "hue"),
            "blur",
        ):
            value, top = getattr(self, name), tops.get(name, 1.0)
            if not 0 <= value <= top:
                raise ConfigError(
                    f"dataloader.train.mapper.variation.{name}={value} must be from 0 to {top:g}."
                )
        if len(self.blur_sigma) != 2 or not 0 <= self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ConfigError(
                f"dataloader.train.mapper.variation.blur_sigma={self.blur_sigma} must be the "
                "smallest and the largest width in pixels."
            )

    def before(self) -> list[T.Augmentation]:
        """What comes before the mapper's augmentations."""
        steps: list[T.Augmentation] = []
        if self.vertical_flip:
            steps.append(T.RandomFlip(prob=self.vertical_flip, horizontal=False, vertical=True))
        if self.quarter_turns:
            steps.append(RandomQuarterTurn(self.quarter_turns))
        return steps

    def behind(self) -> list[T.Augmentation]:
        """What comes behind them."""
        steps: list[T.Augmentation] = []
        if self.brightness or self.contrast or self.saturation or self.hue:
            steps.append(RandomColor(self))
        if self.blur:
            steps.append(RandomApply(RandomBlur(self.blur_sigma), prob=self.blur))
        return steps


class RandomApply(T.RandomApply):
    """Detectron2's, which says in a log what it applies instead of where it lies in memory."""

    def __repr__(self) -> str:
        return f"RandomApply(prob={self.prob:g}, {self.aug})"

    __str__ = __repr__


class RandomQuarterTurn(T.Augmentation):
    """With probability `prob` turns an image by 90, 180 or 270 degrees, each as often."""

    def __init__(self, prob: float) -> None:
        super().__init__()
        self.prob = prob

    def get_transform(self, image: np.ndarray) -> T.Transform:
        if np.random.uniform() >= self.prob:
            return T.NoOpTransform()
        height, width = image.shape[:2]
        turns = np.random.randint(1, 4)
        if turns == 2:
            return T.TransformList([T.HFlipTransform(width), T.VFlipTransform(height)])
        flip = T.VFlipTransform(width) if turns == 1 else T.HFlipTransform(height)
        return T.TransformList([TransposeTransform(), flip])


class TransposeTransform(T.Transform):
    """Rows become columns."""

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        return image.swapaxes(0, 1)

    def apply_segmentation(self, mask: np.ndarray) -> np.ndarray:
        return self.apply_image(mask)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords[:, ::-1]

    def inverse(self) -> T.Transform:
        return self


class PlaceTransform(T.Transform):
    """Shifts an image on a canvas, of which it shows in a window only; the rest is empty.

    Coordinates are clipped to the window: a box that lies outside of it loses its area.

    Args:
        shift: (right, down) in pixels.
        window: (x0, y0, x1, y1) on the canvas, inside of the shifted image.
        size: (height, width) of the canvas.
        value: of pixels where nothing shows.
    """

    def __init__(
        self,
        shift: tuple[int, int],
        window: tuple[int, int, int, int],
        size: tuple[int, int],
        value: float = 0,
    ) -> None:
        super().__init__()
        self.shift = shift
        self.window = window
        self.size = size
        self.value = value

    @property
    def source(self) -> tuple[slice, slice]:
        """Rows and columns of the image that show."""
        (right, down), (x0, y0, x1, y1) = self.shift, self.window
        return slice(y0 - down, y1 - down), slice(x0 - right, x1 - right)

    @property
    def target(self) -> tuple[slice, slice]:
        """Rows and columns of the canvas where they do."""
        x0, y0, x1, y1 = self.window
        return slice(y0, y1), slice(x0, x1)

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        canvas = np.full((*self.size, *image.shape[2:]), self.value, image.dtype)
        canvas[self.target] = image[self.source]
        return canvas

    def apply_segmentation(self, mask: np.ndarray) -> np.ndarray:
        canvas = np.zeros(self.size, mask.dtype)
        canvas[self.target] = mask[self.source]
        return canvas

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return (coords + self.shift).clip(self.window[:2], self.window[2:])


class PixelwiseTransform(T.ColorTransform):
    """Changes the color of every pixel by itself, so that parts of an image can be computed."""


@dataclass(frozen=True)
class ColorMap:
    """``matrix @ color + offset``, rounded to 0 .. 255.

    Attributes:
        matrix: three rows of three numbers.
        offset: the same for all channels.
    """

    matrix: np.ndarray
    offset: float

    @classmethod
    def of(
        cls, brightness: float, contrast: float, saturation: float, hue: float, image_format: str
    ) -> ColorMap:
        """Of factors, and an angle of hue in turns."""
        angle = -2 * np.pi * hue  # red towards yellow, as in HSV
        turn = np.eye(3)
        turn[1:, 1:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        turned = np.linalg.inv(_YIQ) @ turn @ _YIQ
        saturated = saturation * np.eye(3) + (1 - saturation) * np.outer(np.ones(3), _LUMA)
        matrix = brightness * contrast * saturated @ turned
        if image_format == "BGR":
            matrix = matrix[::-1, ::-1]
        return cls(matrix, (1 - contrast) * _MID_GRAY)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """``(H, W, 3)`` uint8 of the model's color order -> the same."""
        rows = [number for row in self.matrix for number in (*row.tolist(), self.offset)]
        return np.asarray(Image.fromarray(image).convert("RGB", tuple(rows)))


class RandomColor(T.Augmentation):
    """Draws brightness, contrast, saturation and hue of a `Variation`."""

    def __init__(self, strength: Variation) -> None:
        super().__init__()
        self.strength = strength

    def get_transform(self, image: np.ndarray) -> T.Transform:
        drawn = np.random.uniform(-1, 1, 4)
        strength = self.strength
        brightness, contrast, saturation = 1 + drawn[:3] * (
            strength.brightness,
            strength.contrast,
            strength.saturation,
        )
        hue = drawn[3] * strength.hue
        color = ColorMap.of(brightness, contrast, saturation, hue, strength.image_format)
        return PixelwiseTransform(color)


class RandomBlur(T.Augmentation):
    """A Gaussian, which Pillow makes of three box filters whose cost does not grow with it."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        super().__init__()
        self.sigma = sigma

    def get_transform(self, image: np.ndarray) -> T.Transform:
        blur = ImageFilter.GaussianBlur(np.random.uniform(*self.sigma))
        return T.ColorTransform(lambda pixels: np.asarray(Image.fromarray(pixels).filter(blur)))
