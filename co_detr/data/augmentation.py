"""Image augmentation of the reference's recipes, composed of Detectron2's transforms."""

from __future__ import annotations

from collections.abc import Sequence

import detectron2.data.transforms as T
import numpy as np

from co_detr.errors import DataError, first_line

# 480, 512, .. 800 pixels, as in DETR and the reference recipe.
DETR_SHORT_EDGES = tuple(range(480, 801, 32))


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


def augment(augmented: T.AugInput, augmentation: T.Augmentation, name: str) -> T.TransformList:
    """Applies an augmentation to `augmented`, in place.

    Args:
        name: of the image, for messages.

    Raises:
        DataError: if the image does not bear it, as some that are very thin.
    """
    height, width = augmented.image.shape[:2]
    try:
        return augmentation(augmented)
    except (ValueError, MemoryError) as error:
        raise DataError(
            f"{name} of {width}x{height} pixels cannot be resized or cropped "
            f"({first_line(error)}): cut it, or leave it out."
        ) from error


def detr_train_augmentation(
    short_edges: Sequence[int] = DETR_SHORT_EDGES,
    max_size: int = 1333,
    crop_probability: float = 0.5,
    crop_short_edges: Sequence[int] = (400, 500, 600),
    crop_size: tuple[int, int] = (384, 600),
    flip_probability: float = 0.5,
    crop_max_size: int = 4200,
) -> list[T.Augmentation]:
    """DETR's two branches: a random flip, then either a resize or resize + crop + resize.

    Both branches end in the same resize, so they are one optional step in front of it.

    Args:
        short_edges: lengths of the shorter side, in pixels, to choose from.
        max_size: upper limit of the longer side, in pixels.
        crop_probability: how often the crop branch is taken.
        crop_short_edges: lengths of the shorter side to choose from before cropping.
        crop_size: (min, max) side of the crop, in pixels; a smaller image is not cropped.
        flip_probability: how often the image is mirrored.
        crop_max_size: upper limit of the longer side before cropping, in pixels, which only
            images reach that are seven times as long as wide; the reference's.
    """
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
        T.RandomApply(crop, prob=crop_probability),
        ResizeShortestEdge(tuple(short_edges), max_size=max_size, sample_style="choice"),
    ]


def lsj_train_augmentation(
    size: int, scales: tuple[float, float] = (0.1, 2.0), flip_probability: float = 0.5
) -> list[T.Augmentation]:
    """Large-scale jitter: resize to a random share of a square, crop to the square, flip.

    The result fits in the square but does not fill it; the model pads it (`BatchPadding`).
    `RandomCrop` and not `FixedSizeCrop`, which would draw one number for both directions.
    Source: Ghiasi et al., "Simple Copy-Paste", CVPR 2021; the reference's LSJ configs, as they
    recommend it for data without masks (that is, without pasting objects of other images).

    Args:
        size: side of the square in pixels.
        scales: (min, max) of the longer side, in sides of the square, before cropping.
        flip_probability: how often the image is mirrored.
    """
    return [
        ResizeScale(*scales, target_height=size, target_width=size),
        T.RandomCrop("absolute", (size, size)),
        T.RandomFlip(prob=flip_probability, horizontal=True),
    ]


def detr_test_augmentation(short_edge: int = 800, max_size: int = 1333) -> list[T.Augmentation]:
    """Resize of the shorter side to `short_edge` pixels, the longer side at most `max_size`."""
    return [ResizeShortestEdge(short_edge, max_size=max_size)]


def _at_least_one_pixel(resize: T.Transform) -> T.Transform:
    if not isinstance(resize, T.ResizeTransform) or min(resize.new_h, resize.new_w) >= 1:
        return resize
    new_shape = (max(1, resize.new_h), max(1, resize.new_w))
    return T.ResizeTransform(resize.h, resize.w, *new_shape, resize.interp)
