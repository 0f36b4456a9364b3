"""What is done to single images: DETR's and LSJ's recipes, and variations; and their transforms.

A recipe flips, crops and resizes; a `Variation` is what may be added: more flips, quarter turns,
colors, blur. Detectron2's own rotation needs OpenCV and its color transforms are one pass over the
image each; here all changes of color are one linear map. Boxes and masks follow exactly: a quarter
turn moves every pixel to one other pixel, and colors move none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import detectron2.data.transforms as T
import numpy as np
from PIL import Image, ImageFilter

from co_detr.errors import ConfigError, require_share, require_whole

# 480, 512, .. 800 pixels, as in DETR and the reference recipe.
DETR_SHORT_EDGES = tuple(range(480, 801, 32))

_LUMA = np.array([0.299, 0.587, 0.114])  # of red, green and blue (ITU-R BT.601), as in Pillow
_MID_GRAY = 127.5
# Colors as brightness and two axes of hue (YIQ): hue turns the latter two.
_YIQ = np.array([_LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def _require_lengths(key: str, lengths: Any) -> None:
    is_list = isinstance(lengths, Sequence) and not isinstance(lengths, str)
    if not is_list or not lengths:
        raise ConfigError(
            f"{key}={lengths} must be a list of lengths in pixels, such as [480,512]."
        )
    for length in lengths:
        require_whole(f"each length of {key}", length)


def detr_train_augmentation(
    short_edges: Sequence[int] = DETR_SHORT_EDGES,
    max_size: int = 1333,
    crop_probability: float = 0.5,
    crop_short_edges: Sequence[int] | None = (400, 500, 600),
    crop_size: tuple[int, int] | None = (384, 600),
    flip_probability: float = 0.5,
    crop_max_size: int = 4200,
) -> list[T.Augmentation]:
    """DETR's two branches: a random flip, then either a resize or resize + crop + resize.

    Both branches end in the same resize, so they are one optional step in front of it.

    Args:
        short_edges: lengths of the shorter side, in pixels, to choose from.
        max_size: upper limit of the longer side, in pixels.
        crop_probability: how often the crop branch is taken.
        crop_short_edges: lengths of the shorter side to choose from before cropping; None: 1/2,
            5/8 and 3/4 of the largest of `short_edges`, as DETR's are of its 800.
        crop_size: (min, max) side of the crop, in pixels; a smaller image is not cropped. None:
            0.48 and 0.75 of the largest of `short_edges`, as DETR's.
        flip_probability: how often the image is mirrored.
        crop_max_size: upper limit of the longer side before cropping, in pixels, which only
            images reach that are seven times as long as wide; the reference's.

    Raises:
        ConfigError: if a value is out of its range.
    """
    key = "dataloader.train.mapper.augmentations"
    _require_lengths(f"{key}.short_edges", short_edges)
    largest = max(short_edges)
    if crop_short_edges is None:
        crop_short_edges = [max(1, round(share * largest)) for share in (0.5, 0.625, 0.75)]
    if crop_size is None:
        crop_size = (max(1, round(0.48 * largest)), max(1, round(0.75 * largest)))
    _require_lengths(f"{key}.crop_short_edges", crop_short_edges)
    _require_lengths(f"{key}.crop_size", crop_size)
    if len(crop_size) != 2 or crop_size[0] > crop_size[1]:
        raise ConfigError(
            f"{key}.crop_size={list(crop_size)} must be the smallest and the largest side."
        )
    require_whole(f"{key}.max_size", max_size)
    require_whole(f"{key}.crop_max_size", crop_max_size)
    require_share(f"{key}.crop_probability", crop_probability)
    require_share(f"{key}.flip_probability", flip_probability)
    crop = T.AugmentationList(
        [
            ResizeShortestEdge(
                tuple(crop_short_edges), max_size=crop_max_size, sample_style="choice"
            ),
            T.RandomCrop("absolute_range", tuple(crop_size)),
        ]
    )
    return [
        T.RandomFlip(prob=flip_probability, horizontal=True),
        RandomApply(crop, prob=crop_probability),
        ResizeShortestEdge(tuple(short_edges), max_size=max_size, sample_style="choice"),
    ]


def lsj_train_augmentation(
    size: int, scales: tuple[float, float] = (0.1, 2.0), flip_probability: float = 0.5
) -> list[T.Augmentation]:
    """Large-scale jitter: resize to a random share of a square, crop to the square, flip.

    The result fits in the square but does not fill it; the model pads it (`BatchPadding`).
    `RandomCrop` and not `FixedSizeCrop`, which would draw one number for both directions.
    Source: Ghiasi et al., "Simple Copy-Paste", CVPR 2021; the reference's LSJ configs.
    Objects of other images are pasted by `CopyPaste`, where the data have masks.

    Args:
        size: side of the square in pixels.
        scales: (min, max) of the longer side, in sides of the square, before cropping.
        flip_probability: how often the image is mirrored.

    Raises:
        ConfigError: if a value is out of its range.
    """
    key = "dataloader.train.mapper.augmentations"
    require_whole(f"{key}.size", size)
    require_share(f"{key}.flip_probability", flip_probability)
    if len(scales) != 2 or not 0 < scales[0] <= scales[1]:
        raise ConfigError(
            f"{key}.scales={list(scales)} must be the smallest and the largest scale, above 0."
        )
    return [
        ResizeScale(*scales, target_height=size, target_width=size),
        T.RandomCrop("absolute", (size, size)),
        T.RandomFlip(prob=flip_probability, horizontal=True),
    ]


def detr_test_augmentation(short_edge: int = 800, max_size: int = 1333) -> list[T.Augmentation]:
    """Resize of the shorter side to `short_edge` pixels, the longer side at most `max_size`.

    Raises:
        ConfigError: if one is no whole number of at least 1.
    """
    require_whole("dataloader.test.mapper.augmentations.short_edge", short_edge)
    require_whole("dataloader.test.mapper.augmentations.max_size", max_size)
    return [ResizeShortestEdge(short_edge, max_size=max_size)]


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's resize, which leaves at least one pixel of images that are very thin."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return _at_least_one_pixel(super().get_transform(image))

    @staticmethod
    def get_output_shape(
        oldh: int, oldw: int, short_edge_length: int, max_size: int
    ) -> tuple[int, int]:
        """Height and width that an image is resized to."""
        shape = T.ResizeShortestEdge.get_output_shape(oldh, oldw, short_edge_length, max_size)
        return max(1, shape[0]), max(1, shape[1])


class ResizeScale(T.ResizeScale):
    """Detectron2's resize to a random size, which leaves at least one pixel, too."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return _at_least_one_pixel(super().get_transform(image))


class ChannelResize(T.ResizeTransform):
    """Detectron2's resize, also for other numbers of channels, which Pillow has no mode for.

    Three are resized as Detectron2 does; others give what each would give as a gray image.
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        if img.dtype != np.uint8 or img.ndim != 3 or img.shape[2] in (1, 3):
            return super().apply_image(img, interp)
        channels = np.split(img, img.shape[2], axis=2)
        return np.concatenate(
            [super(ChannelResize, self).apply_image(c, interp) for c in channels], 2
        )


def _at_least_one_pixel(resize: T.Transform) -> T.Transform:
    if not isinstance(resize, T.ResizeTransform):
        return resize
    new_shape = (max(1, resize.new_h), max(1, resize.new_w))
    return ChannelResize(resize.h, resize.w, *new_shape, resize.interp)


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
            key = f"dataloader.train.mapper.variation.{name}"
            require_share(key, getattr(self, name), tops.get(name, 1.0))
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
