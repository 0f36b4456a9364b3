"""Masks of an image while it is augmented: bitmaps of the parts that objects cover.

A polygon or run-length mask is small; it becomes a bitmap only when its image is loaded. Then it is
drawn at the size of the image, and every pixel of the augmented image takes the value of one pixel
of it, as the reference does it (``LoadAnnotations(poly2mask=True)``, ``BitmapMasks``). Polygons
that are cropped as such would need another package, give other training targets (about 3 % of their
pixels), and are drawn on the host in every step. A bitmap has a byte per pixel and object: 7 MB for
an image of COCO (7 objects in 800x1200), 100 MB for 100 objects in 1024x1024. So augmentation only
keeps the part that an object covers (`CroppedMasks`); whole bitmaps are made last, and only if the
model learns masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import detectron2.data.transforms as T
import numpy as np
import pycocotools.mask as mask_utils
import torch
from detectron2.structures import BitMasks, Boxes

from co_detr.data.augmentation import PlaceTransform, TransposeTransform
from co_detr.data.segmentation import Segmentation, decompressed, extent_of, run_lengths
from co_detr.mask_patch import MaskPatch, first_to_last

_PLAIN_TRANSFORMS = (T.NoOpTransform, T.ColorTransform, T.BlendTransform)  # leave pixels in place


class CroppedMasks:
    """Masks of n objects of an image, a field of its `Instances`.

    Args:
        image_size: (height, width).
        patches: n, each trimmed, so that its window is the box around its pixels.
    """

    def __init__(self, image_size: tuple[int, int], patches: list[MaskPatch]) -> None:
        self.image_size = image_size
        self.patches = patches

    @classmethod
    def placed(cls, image_size: tuple[int, int], patches: Iterable[MaskPatch]) -> CroppedMasks:
        """Of patches that need not be trimmed."""
        return cls(image_size, [patch.trimmed() for patch in patches])

    @classmethod
    def of_bitmaps(cls, bitmaps: np.ndarray, image_size: tuple[int, int]) -> CroppedMasks:
        """Of ``(n, height, width)`` bool."""
        return cls.placed(image_size, (MaskPatch(0, 0, bitmap) for bitmap in bitmaps))

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, item: slice | torch.Tensor) -> CroppedMasks:
        chosen = item.numpy() if isinstance(item, torch.Tensor) else item
        numbers = np.arange(len(self))[chosen]
        return CroppedMasks(self.image_size, [self.patches[number] for number in numbers])

    @staticmethod
    def cat(every: Sequence[CroppedMasks]) -> CroppedMasks:
        """One behind the other: of the image of the first, at whose corner the others begin, too.

        `Instances.cat` calls it.
        """
        return CroppedMasks(
            every[0].image_size, [patch for masks in every for patch in masks.patches]
        )

    def boxes(self) -> Boxes:
        """Around the pixels of each mask, the last ones included; zeros without any."""
        windows = (patch.window for patch in self.patches)
        corners = [(x.start, y.start, x.stop, y.stop) for y, x in windows]
        return Boxes(torch.tensor(corners, dtype=torch.float32).reshape(-1, 4))

    def whole(self) -> BitMasks:
        """Bitmaps of the whole image."""
        bitmaps = np.zeros((len(self), *self.image_size), bool)
        for bitmap, patch in zip(bitmaps, self.patches, strict=True):
            bitmap[patch.window] = patch.pixels
        return BitMasks(torch.from_numpy(bitmaps))


def draw_mask(usable: Segmentation, height: int, width: int) -> np.ndarray:
    """``(height, width)`` uint8 of 0 and 1: the pixels of a mask of `check_mask`."""
    return mask_utils.decode(run_lengths(usable, height, width))


def transformed_masks(
    masks: Sequence[Segmentation], size: tuple[int, int], transforms: T.TransformList
) -> CroppedMasks:
    """The masks of an image after its augmentation, which takes the pixels that are nearest.

    Args:
        masks: of n objects.
        size: (height, width) of the image before.
        transforms: of the image.

    Returns:
        n masks in the image that is behind `transforms`.
    """
    picked = picked_pixels(transforms, size)
    if picked is None:  # turned by an angle, say
        whole = np.stack([transforms.apply_segmentation(draw_mask(mask, *size)) for mask in masks])
        return CroppedMasks.of_bitmaps(whole != 0, whole.shape[1:])
    size_after = len(picked.rows), len(picked.columns)
    patches = (_picked_patch(mask, size, picked.rows, picked.columns) for mask in masks)
    if picked.transposed:
        size_after = size_after[::-1]
        patches = (MaskPatch(patch.top, patch.left, patch.pixels.T) for patch in patches)
    return CroppedMasks.placed(size_after, patches)


def _picked_patch(
    mask: Segmentation, size: tuple[int, int], rows: np.ndarray, columns: np.ndarray
) -> MaskPatch:
    """Where the object is in ``mask[rows][:, columns]``."""
    left, top, right, bottom = extent_of(mask)
    # A pixel around, as drawing rounds the edges.
    down = first_to_last((rows >= max(math.floor(top) - 1, 0)) & (rows <= bottom + 1))
    across = first_to_last((columns >= max(math.floor(left) - 1, 0)) & (columns <= right + 1))
    rows, columns = rows[down], columns[across]
    if not (len(rows) and len(columns)):
        return MaskPatch(0, 0, np.zeros((0, 0), bool))
    height, first, last = size[0], columns.min(), columns.max() + 1
    # Runs go down the columns of the image; of these only the object's are drawn.
    lengths = decompressed(run_lengths(mask, *size)["counts"])
    ends = lengths.cumsum().clip(first * height, last * height)
    lengths = np.diff(ends, prepend=first * height)
    drawn = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(-1, height)
    drawn = np.ascontiguousarray(drawn[:, rows.min() : rows.max() + 1].T)
    picked = drawn.take(rows - rows.min(), axis=0).take(columns - first, axis=1)
    return MaskPatch(across.start, down.start, picked)


@dataclass(frozen=True)
class PickedPixels:
    """Which pixels of an image its augmented form shows.

    Attributes:
        rows, columns: of the image, in the order in which they show; -1 where nothing of it does.
        transposed: whether its columns have become the rows of the augmented form.
    """

    rows: np.ndarray
    columns: np.ndarray
    transposed: bool = False


def picked_pixels(transforms: T.TransformList, size: tuple[int, int]) -> PickedPixels | None:
    """Follows rows and columns of an image through its augmentation.

    Of the nearest pixel when it is resized: that of OpenCV, which the reference takes (row r of H
    shows ``floor(r * h / H)``), not that of Pillow, which Detectron2 takes.

    Args:
        size: (height, width) of the image before.

    Returns:
        None if rows and columns do not stay rows and columns, or a transform is not known.
    """
    rows, columns = (np.arange(side) for side in size)
    transposed = False
    for transform in transforms.transforms:
        if isinstance(transform, T.ResizeTransform):
            rows, columns = (
                rows[_nearest(len(rows), transform.new_h)],
                columns[_nearest(len(columns), transform.new_w)],
            )
        elif isinstance(transform, T.CropTransform):
            rows = rows[transform.y0 : transform.y0 + transform.h]
            columns = columns[transform.x0 : transform.x0 + transform.w]
        elif isinstance(transform, T.HFlipTransform):
            columns = columns[::-1]
        elif isinstance(transform, T.VFlipTransform):
            rows = rows[::-1]
        elif isinstance(transform, TransposeTransform):
            rows, columns, transposed = columns, rows, not transposed
        elif isinstance(transform, PlaceTransform):
            shown = rows[transform.source[0]], columns[transform.source[1]]
            rows, columns = (np.full(side, -1) for side in transform.size)
            rows[transform.target[0]], columns[transform.target[1]] = shown
        elif not isinstance(transform, _PLAIN_TRANSFORMS):
            return None
    if transposed:
        rows, columns = columns, rows
    return PickedPixels(rows, columns, transposed)


def _nearest(before: int, after: int) -> np.ndarray:
    """``(after,)``: as OpenCV computes it, with its rounding."""
    return np.minimum((np.arange(after) * (1 / (after / before))).astype(np.int64), before - 1)
