"""A mask as a bitmap of the part of its image that it covers: in data, predictions, pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_utils


@dataclass(frozen=True)
class MaskPatch:
    """The part of an image that has all pixels of a mask; the rest of the image is background.

    Attributes:
        left, top: of its first pixel in the image.
        pixels: ``(h, w)`` bool; can be empty.
    """

    left: int
    top: int
    pixels: np.ndarray

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the image."""
        height, width = self.pixels.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    def trimmed(self) -> MaskPatch:
        """A copy without rows and columns of background at its sides; the smallest there is.

        One without any pixel of the mask stands at the corner of the image.
        """
        rows, columns = (first_to_last(self.pixels.any(axis)) for axis in (1, 0))
        pixels = self.pixels[rows, columns].copy()  # what it is cut out of can be a whole image
        if not pixels.size:
            return MaskPatch(0, 0, pixels)
        return MaskPatch(self.left + columns.start, self.top + rows.start, pixels)

    def rle(self, image_size: tuple[int, int]) -> dict[str, Any]:
        """COCO's compressed run-length form of the mask in an image (height, width), as for json.

        The runs are counted here and not by pycocotools, which wants the whole bitmap: that takes
        a second for a dozen objects of a large photo.
        """
        height, width = image_size
        columns = np.zeros((self.pixels.shape[1], self.pixels.shape[0] + 2), np.int8)
        columns[:, 1:-1] = self.pixels.T
        steps = np.diff(columns, axis=1)
        # Places in the image, column after column, where a run begins and behind its end.
        begins, ends = (
            (column + self.left) * height + row + self.top
            for column, row in (np.nonzero(steps == 1), np.nonzero(steps == -1))
        )
        bounds = np.stack([begins, ends], axis=1).ravel()
        # A run that goes on at the top of the next column ends where the next one begins.
        joints = np.flatnonzero(bounds[1:] == bounds[:-1])
        bounds = np.delete(bounds, np.append(joints, joints + 1))
        counts = np.diff(bounds, prepend=0, append=height * width).tolist()
        if len(counts) > 1 and counts[-1] == 0:
            counts.pop()
        encoded = mask_utils.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        return {"size": [height, width], "counts": encoded["counts"].decode()}


def first_to_last(chosen: np.ndarray) -> slice:
    """From the first to the last that is true of ``(n,)`` bool; an empty slice without any."""
    (places,) = np.nonzero(chosen)
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)
