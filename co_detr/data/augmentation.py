"""Image augmentation of the reference's recipes, composed of Detectron2's transforms."""

from __future__ import annotations

from collections.abc import Sequence

import detectron2.data.transforms as T

# 480, 512, .. 800 pixels, as in DETR and the reference recipe.
DETR_SHORT_EDGES = tuple(range(480, 801, 32))


def detr_train_augmentation(
    short_edges: Sequence[int] = DETR_SHORT_EDGES,
    max_size: int = 1333,
    crop_probability: float = 0.5,
    crop_short_edges: Sequence[int] = (400, 500, 600),
    crop_size: tuple[int, int] = (384, 600),
    flip_probability: float = 0.5,
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
    """
    crop = T.AugmentationList(
        [
            T.ResizeShortestEdge(tuple(crop_short_edges), sample_style="choice"),
            T.RandomCrop("absolute_range", tuple(crop_size)),
        ]
    )
    return [
        T.RandomFlip(prob=flip_probability, horizontal=True),
        T.RandomApply(crop, prob=crop_probability),
        T.ResizeShortestEdge(tuple(short_edges), max_size=max_size, sample_style="choice"),
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
        T.ResizeScale(*scales, target_height=size, target_width=size),
        T.RandomCrop("absolute", (size, size)),
        T.RandomFlip(prob=flip_probability, horizontal=True),
    ]


def detr_test_augmentation(short_edge: int = 800, max_size: int = 1333) -> list[T.Augmentation]:
    """Resize of the shorter side to `short_edge` pixels, the longer side at most `max_size`."""
    return [T.ResizeShortestEdge(short_edge, max_size=max_size)]
