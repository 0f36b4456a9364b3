"""The size of an image as training reads it: upright, whatever the EXIF orientation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from co_detr.data.images import ImageReader, name_of, orientation_of

XYXY = tuple[float, float, float, float]


@dataclass(frozen=True)
class ImageSize:
    """Attributes:
    width, height: of the upright image, in pixels.
    orientation: the EXIF orientation, from 1 (the stored pixels are upright) to 8.
    """

    width: int
    height: int
    orientation: int = 1

    @property
    def lies_on_its_side(self) -> bool:
        """Whether the stored pixels have width and height exchanged."""
        return self.orientation >= 5

    def turned(self, xyxy: XYXY) -> XYXY:
        """A box of the stored pixels, of an image that lies on its side, in the upright image."""
        x0, y0, x1, y1 = xyxy
        # Row and column change places; then one or both are counted from the other end.
        left, top, right, bottom = y0, x0, y1, x1
        if self.orientation in (6, 7):
            left, right = self.width - y1, self.width - y0
        if self.orientation in (7, 8):
            top, bottom = self.height - x1, self.height - x0
        return left, top, right, bottom


def read_size(path: Path) -> ImageSize:
    """Reads the head of an image file; only images with an orientation are decoded.

    Raises:
        DataError: if the file is no image that can be read.
    """
    reader = ImageReader(max_pixels=None)  # a head fits into the memory
    with reader.open(path, name_of(path)) as image:
        orientation = orientation_of(image)
        size = image.size if orientation == 1 else reader.decode(image, name_of(path)).size
        return ImageSize(*size, orientation)
