"""Image files, PIL images and arrays as pixels, read the way training reads them."""

from __future__ import annotations

import os

import numpy as np
from detectron2.data.detection_utils import (
    _apply_exif_orientation,
    convert_PIL_to_numpy,
    read_image,
)
from PIL import Image

from co_detr.errors import DataError, first_line

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray


def read_rgb(source: ImageSource) -> np.ndarray:
    """Reads an image as Detectron2's data mapper does.

    The orientation in the EXIF data is applied; grey, RGBA, palette and CMYK images become RGB.
    Pillow cuts 16-bit values off at 255.

    Args:
        source: a file; a PIL image; or an array of uint8, ``(H, W)`` grey, ``(H, W, 3)`` in the
            order red, green, blue, or ``(H, W, 4)`` with alpha, which is dropped.

    Returns:
        ``(H, W, 3)`` uint8, in the order red, green, blue.

    Raises:
        DataError: if a file is missing or cannot be decoded, or a value is not an image.
    """
    if isinstance(source, np.ndarray):
        return _of_array(source)
    name = "the image" if isinstance(source, Image.Image) else f"image {source}"
    try:
        if isinstance(source, Image.Image):
            return convert_PIL_to_numpy(upright(source), "RGB")
        if isinstance(source, str | os.PathLike):
            return read_image(os.fspath(source), "RGB")
    except FileNotFoundError as error:
        raise DataError(f"{name} does not exist: correct the path.") from error
    except Exception as error:  # a damaged file can make a decoder raise anything
        reason = first_line(error)
        raise DataError(f"{name} cannot be decoded ({reason}): replace the file.") from error
    raise DataError(
        f"a {type(source).__name__} is not an image: pass a path, a PIL image, an array of uint8, "
        "or a list of these."
    )


def upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF data say it is to be seen; the very same one if they say nothing."""
    # The public ImageOps.exif_transpose fails on some EXIF data that this one bears.
    return _apply_exif_orientation(image)


def in_format(rgb: np.ndarray, image_format: str) -> np.ndarray:
    """Pixels in the colour order of a config's ``data.image_format``."""
    return convert_PIL_to_numpy(Image.fromarray(rgb), image_format)


def _of_array(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if not fits or pixels.dtype != np.uint8 or pixels.size == 0:
        raise DataError(
            f"an array of {pixels.dtype} of shape {pixels.shape} is not an image: pass uint8 of "
            "shape (height, width, 3), in the order red, green, blue."
        )
    return convert_PIL_to_numpy(Image.fromarray(np.ascontiguousarray(pixels)), "RGB")
