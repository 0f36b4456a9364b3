"""The one place that opens images: files, PIL images and arrays become upright RGB of 8 bits.

Training, preflight, evaluation, prediction, the demo page, export, conversion and pictures all read
through `ImageReader`, so that an image is the same for all of them. What is decided here:

* The orientation in the EXIF data is applied; EXIF data that cannot be read count as none.
* Of files with several frames or pages the first one is read.
* Every mode of Pillow becomes RGB. Transparency is dropped, and what is below it shows.
* Values of 8 bits stay as they are. Those of 16 bits are scaled from the range of their type, or
  from `ImageReader.value_range`; 32-bit and floating-point values need that range.
* Formats for which Pillow starts other programs, such as EPS, are not read.
* Images of another number of channels than three (`ImageReader.channels`) come from .npy and TIFF
  files, whose channels stay as they are.
"""

from __future__ import annotations

import io
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from co_detr.errors import ConfigError, DataError, first_line, require_whole

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray

# About where Pillow's own limit, which is twice Image.MAX_IMAGE_PIXELS, is by default.
MAX_PIXELS = 180_000_000

# Pillow starts Ghostscript for EPS, which runs what the file says; WMF goes to Windows; IPTC opens
# what it holds with any of its readers; for the others Pillow only knows how files begin.
_REFUSED_FORMATS = frozenset(("EPS", "WMF", "IPTC", "BUFR", "GRIB", "HDF5", "MPEG"))

_ORIENTATION = 274  # EXIF tag
# What turns the stored pixels (H, W, ...) upright, by EXIF orientation.
_TURNS = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored.swapaxes(0, 1)[::-1],
}

_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_PLANAR, _TIFF_SAMPLE_FORMAT = 258, 262, 284, 339
_SIGNED = 2  # TIFF's sample format
# Layouts of 16-bit colors in files: Pillow, which has no mode for them, keeps one byte of each.
_DEEP_COLORS = re.compile(r"(RGB|RGBX|RGBA);16([BLN])")
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
# Modes that only convert to RGB by way of another one.
_STEPS = {"La": "LA", "RGBa": "RGBA"}

_pillow_lock = threading.Lock()


class ImageError(DataError):
    """An image that cannot be used.

    Attributes:
        what: the defect in the plural, for lists of images.
        says: the defect, as it follows the name of the image.
        remedy: what to do.
    """

    # Loading workers pass on errors with their message alone, so the rest must be optional.
    def __init__(self, message: str, what: str = "", says: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.what, self.says, self.remedy = what, says, remedy


@dataclass(frozen=True)
class Pixels:
    """An image as its file has it, but upright.

    Attributes:
        values: ``(H, W)`` gray, ``(H, W, 3)`` red, green, blue, or ``(H, W, C)`` other channels.
            uint8 is of 8 bits; any other type holds values that have to be scaled.
        type_range: the values of black and white by their type; None: the type does not say.
        white_is_low: gray with black and white exchanged.
        depth_lost: the file has 16 bits in a layout of which Pillow gives the upper 8.
    """

    values: np.ndarray
    type_range: tuple[float, float] | None = None
    white_is_low: bool = False
    depth_lost: bool = False

    @property
    def is_deep(self) -> bool:
        return self.values.dtype != np.uint8

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.values.shape[1], self.values.shape[0]


@dataclass(frozen=True)
class ImageReader:
    """Reads images; a value, so that it reaches loading workers however they are started.

    Attributes:
        value_range: the values that become 0 and 255, of images with more than 8 bits per channel;
            what lies outside is cut off. None: the range of the type (0 to 65535 for 16 bits),
            which 32-bit and floating-point values do not have.
        max_pixels: files with more are refused, as memory may not suffice for them; None: no limit.
        channels: of the images. With another number than 3, all must be .npy files, TIFF files or
            arrays with that many.

    Raises:
        ConfigError: if a setting is wrong.
    """

    value_range: tuple[float, float] | None = None
    max_pixels: int | None = MAX_PIXELS
    channels: int = 3

    def __post_init__(self) -> None:
        if self.value_range is not None:
            object.__setattr__(self, "value_range", _checked_range(self.value_range))
        require_whole("data.max_image_pixels", self.max_pixels, or_null="for no limit")
        require_whole("data.channels", self.channels)

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> ImageReader:
        """The reader that the node ``data`` of a config asks for, also of an earlier version."""
        return cls(
            data.get("value_range"),
            data.get("max_image_pixels", MAX_PIXELS),
            data.get("channels", 3),
        )

    def read_rgb(self, source: ImageSource) -> np.ndarray:
        """Reads an image.

        Args:
            source: a file; a PIL image; or an array, ``(H, W)`` gray, ``(H, W, 3)`` in the order
                red, green, blue, or ``(H, W, 4)`` with alpha, which is dropped. An array of another
                type than uint8 is scaled as a file of this type is.

        Returns:
            ``(H, W, 3)`` uint8, in the order red, green, blue; with other `channels` so many, as
            they are.

        Raises:
            DataError: if a file is missing, cannot be decoded or is too large, if the range of
                values is not known, or if a value is not an image.
        """
        return self.scale(self.decode(source), name_of(source))

    def decode(self, source: ImageSource, name: str | None = None) -> Pixels:
        """The first half of `read_rgb`: the upright image before its values are scaled.

        Args:
            name: of the image, for messages; by default its path.
        """
        if isinstance(source, np.ndarray):
            return _of_array(source) if self.channels == 3 else _of_channels(source, self.channels)
        if not isinstance(source, str | os.PathLike | Image.Image):
            raise DataError(
                f"a {type(source).__name__} is not an image: pass a path, a PIL image, an array "
                "of uint8, or a list of these."
            )
        name = name or name_of(source)
        if self.channels != 3:
            return self._decode_channels(source, name)
        if isinstance(source, Image.Image):
            if source.format in _REFUSED_FORMATS:
                raise _undecodable(name, f"{source.format} files are not read")
            return self._decode(source, name)
        with self.open(source, name) as image:
            return self._decode(image, name)

    def open(
        self,
        file: str | os.PathLike[str] | BinaryIO,
        name: str,
        formats: Sequence[str] | None = None,
    ) -> Image.Image:
        """Opens a file, of which only the head is read.

        Args:
            name: of the image, for messages.
            formats: names of the formats that may be read; by default those of `readable_formats`.

        Raises:
            DataError: if it is missing, no image, or has too many pixels.
        """
        allowed = [format for format in readable_formats() if formats is None or format in formats]
        try:
            try:
                image = Image.open(file, formats=allowed)
            except Image.DecompressionBombError:  # Pillow's limit is another one than ours
                with _without_pillow_limit():
                    image = Image.open(file, formats=allowed)
        except FileNotFoundError as error:
            raise DataError(f"{name} does not exist: correct the path.") from error
        except Image.UnidentifiedImageError as error:
            others = "no format, or no variant of one, that is read here"
            reason = f"it is none of {', '.join(formats)}" if formats else others
            raise _undecodable(name, reason) from error
        except Exception as error:  # a damaged file can make a decoder raise anything
            raise _undecodable(name, first_line(error)) from error
        try:
            self._require_few_pixels(image.width, image.height, name)
        except ImageError:
            image.close()
            raise
        return image

    def scale(self, pixels: Pixels, name: str) -> np.ndarray:
        """The second half of `read_rgb`: ``(H, W, 3)`` uint8.

        Args:
            name: of the image, for messages.

        Raises:
            DataError: if the range of the values is not known, or some are NaN or infinite.
        """
        values = pixels.values
        if pixels.depth_lost and self.value_range is not None:
            raise _error(
                name,
                "has 16 bits in a layout that is only read with 8, to which data.value_range "
                "cannot be applied",
                "images of 16 bits that are only read with 8",
                "save it as gray or RGB of 16 bits without transparency, not premultiplied",
            )
        if not pixels.is_deep:
            return values
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise _error(
                name,
                "holds values that are NaN or infinite",
                "images with values that are NaN or infinite",
                "write numbers in their place, such as the value of black",
            )
        limits = self.value_range or pixels.type_range
        if limits is None:
            raise _error(
                name,
                f"has {values.dtype} values, here from {values.min():g} to {values.max():g}, and "
                "it is not known which are black and white",
                "images of 32-bit or floating-point values without data.value_range",
                "set data.value_range=[BLACK,WHITE], the same for the whole data set",
            )
        scaled = _scaled(values, *limits)
        if pixels.white_is_low:
            scaled = 255 - scaled
        return scaled if scaled.ndim == 3 else np.repeat(scaled[:, :, None], 3, axis=2)

    def _require_few_pixels(self, width: int, height: int, name: str) -> None:
        if self.max_pixels is not None and width * height > self.max_pixels:
            raise _error(
                name,
                f"of {width}x{height} pixels has more than the {self.max_pixels:,} that are "
                "allowed",
                "images with more pixels than data.max_image_pixels",
                "make it smaller, or raise data.max_image_pixels if the memory suffices for it "
                "(in predict.py and demo.py --max-image-pixels)",
            )

    def _decode_channels(self, source: str | os.PathLike[str] | Image.Image, name: str) -> Pixels:
        """Of a file with another number of channels than three, which Pillow has no mode for."""
        path = "" if isinstance(source, Image.Image) else os.fspath(source)
        try:
            if path.lower().endswith(".npy"):
                # Of the file only the head is read until the size is known to be allowed.
                stored = np.load(path, mmap_mode="r", allow_pickle=False)
            elif path.lower().endswith((".tif", ".tiff")):
                stored = _open_tiff(path)
            else:
                raise _error(
                    name,
                    f"is no .npy or TIFF file, from which images of {self.channels} channels are "
                    "read",
                    f"images of formats that do not have {self.channels} channels",
                    "save its channels in such a file, or set data.channels=3",
                )
            height, width = _upright_shape(stored.shape, self.channels)[:2]
            self._require_few_pixels(width, height, name)
            values = np.array(stored if isinstance(stored, np.ndarray) else stored.asarray())
        except FileNotFoundError as error:
            raise DataError(f"{name} does not exist: correct the path.") from error
        except (ConfigError, DataError):
            raise
        except Exception as error:  # a damaged file can make a decoder raise anything
            raise _undecodable(name, first_line(error)) from error
        return _of_channels(values, self.channels, name)

    def _decode(self, image: Image.Image, name: str) -> Pixels:
        try:
            if image.width * image.height <= (Image.MAX_IMAGE_PIXELS or sys.maxsize):
                return self._pixels(image, name)
            # Some formats are checked against Pillow's limit once more. One at a time: few fit.
            with _without_pillow_limit():
                return self._pixels(image, name)
        except DataError:
            raise
        except Exception as error:  # a damaged file can make a decoder raise anything
            raise _undecodable(name, first_line(error)) from error

    def _pixels(self, image: Image.Image, name: str) -> Pixels:
        layouts = [_layout(tile) for tile in getattr(image, "tile", [])]
        deep_colors = bool(layouts) and all(_DEEP_COLORS.fullmatch(layout) for layout in layouts)
        bits = _tiff_tag(image, _TIFF_BITS)
        sample_format = _tiff_tag(image, _TIFF_SAMPLE_FORMAT)
        white_is_low = bits > 0 and _tiff_tag(image, _TIFF_PHOTOMETRIC, 1) == 0
        in_planes = _tiff_tag(image, _TIFF_PLANAR) == 2 and len(image.getbands()) > 1
        if bits > 8 and in_planes:  # Pillow mixes the colors up
            raise _undecodable(name, f"its colors of {bits} bits lie in separate planes")
        twin = self._other_bytes(image) if deep_colors else None
        image.load()
        # Only now: Pillow itself turns some TIFF files while it loads them.
        turn = _TURNS[orientation_of(image)]
        if twin is not None:
            high, low = (
                np.asarray(picture)[:, :, :3].astype(np.uint16) for picture in (image, twin)
            )
            return Pixels(turn(high << 8 | low), (0, 65535))
        if image.mode.startswith("I;16"):
            values = np.asarray(image).astype(np.uint16)  # in the byte order of this machine
            return Pixels(turn(values), (0, 2 ** (bits or 16) - 1), white_is_low)
        if image.mode in ("I", "F"):
            values = np.asarray(image)
            if image.mode == "I" and bits == 32 and sample_format != _SIGNED:
                values = values.view(np.uint32)
            # Pillow's mode for 16-bit PGM, and once also for 16-bit PNG.
            is_16_bit = image.mode == "I" and image.format in ("PNG", "PPM")
            return Pixels(turn(values), (0, 65535) if is_16_bit else None, white_is_low)
        if image.mode == "L" and sample_format == _SIGNED:
            return Pixels(turn(np.asarray(image).view(np.int8)), (-128, 127), white_is_low)
        depth_lost = any(";16" in layout for layout in layouts)
        image = image.convert(_STEPS[image.mode]) if image.mode in _STEPS else image
        return Pixels(turn(np.asarray(image.convert("RGB"))), depth_lost=depth_lost)

    def _other_bytes(self, image: Image.Image) -> Image.Image:
        """The lower bytes of 16-bit colors, of which Pillow's own image has the upper ones.

        Read the other way round, the lower byte of each value is where the upper one should be.
        """
        position = image.fp.tell()
        image.fp.seek(0)
        twin = Image.open(io.BytesIO(image.fp.read()), formats=[image.format])
        image.fp.seek(position)
        twin.seek(image.tell())
        twin.tile = [_read_other_way_round(tile) for tile in twin.tile]
        twin.load()
        return twin


def readable_formats() -> list[str]:
    """Pillow's names of the formats that are read, in the order in which Pillow tries them."""
    Image.init()
    return [name for name in Image.ID if name not in _REFUSED_FORMATS]


def image_suffixes() -> frozenset[str]:
    """Endings of the files that are read, in lower case, such as ".jpg"."""
    formats = {*readable_formats(), "MPO"}  # which Pillow reads as JPEG
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in known if name in formats)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, from 1 (the stored pixels are upright) to 8; broken data count as 1."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
        return int(orientation) if orientation in _TURNS else 1
    except Exception:  # broken EXIF data can raise anything, and are no reason to lose the image
        return 1


def is_deep(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet has more than 8 bits per channel."""
    layouts = (_layout(tile) for tile in getattr(image, "tile", []))
    return image.mode.startswith(("I", "F")) or any(";16" in layout for layout in layouts)


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Lifts Pillow's limit, which is one for the whole process, for as short as possible."""
    with _pillow_lock:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def name_of(source: ImageSource) -> str:
    """How messages call an image."""
    return f"image {os.fspath(source)}" if isinstance(source, str | os.PathLike) else "the image"


def _error(name: str, says: str, what: str, remedy: str) -> ImageError:
    return ImageError(f"{name} {says}: {remedy}.", what, says, remedy)


def _undecodable(name: str, reason: str) -> ImageError:
    return _error(
        name,
        f"cannot be decoded ({reason})",
        "image files that cannot be decoded",
        "replace the file, or leave the image out",
    )


def _layout(tile: Sequence[Any]) -> str:
    """Pillow's name of the layout of a part of a file, such as "RGB;16B"; "" if it has none."""
    arguments = tile[3]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _read_other_way_round(tile: Any) -> Any:
    layout = _layout(tile)
    other = layout[:-1] + _OTHER_BYTE[layout[-1]]
    arguments = (other, *tile[3][1:]) if isinstance(tile[3], tuple) else other
    make = getattr(type(tile), "_make", tuple)  # a plain tuple in earlier versions of Pillow
    return make((*tile[:3], arguments))


def _tiff_tag(image: Image.Image, tag: int, default: int = 0) -> int:
    """A number in the head of a TIFF file, the first of several."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else default


def _of_array(values: np.ndarray) -> Pixels:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    fits = values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))
    if not fits or values.dtype.kind not in "uif" or values.size == 0:
        raise DataError(
            f"an array of {values.dtype} of shape {values.shape} is not an image: pass uint8 of "
            "shape (height, width, 3), in the order red, green, blue."
        )
    if values.ndim == 3:
        values = values[:, :, :3]
    if values.dtype == np.uint8:
        gray = values.ndim == 2
        return Pixels(np.repeat(values[:, :, None], 3, axis=2) if gray else values)
    return Pixels(values, (0, 65535) if values.dtype == np.uint16 else None)


def _of_channels(values: np.ndarray, channels: int, name: str = "an array") -> Pixels:
    shape = _upright_shape(values.shape, channels)
    if len(shape) != 3 or shape[2] != channels or values.dtype.kind not in "uif" or not values.size:
        raise _error(
            name,
            f"of {values.dtype} values of shape {values.shape} is no image of {channels} channels",
            f"images that do not have {channels} channels",
            f"save numbers of shape (height, width, {channels}), or correct data.channels",
        )
    if values.ndim == 3 and values.shape != shape:
        values = np.moveaxis(values, 0, 2)
    values = values.reshape(shape)
    if values.dtype == np.uint8:
        return Pixels(values)
    return Pixels(values, (0, 65535) if values.dtype == np.uint16 else None)


def _upright_shape(shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """(height, width, channels) of an array with one channel, or with channels in front."""
    if len(shape) == 2:
        return (*shape, 1)
    if len(shape) == 3 and shape[2] != channels and shape[0] == channels:
        return (*shape[1:], channels)
    return shape


def _open_tiff(path: str) -> Any:
    """The first image of a file, with `shape` and `asarray()`; channels may be pages."""
    try:
        import tifffile
    except ImportError as error:
        raise ConfigError(
            f"TIFF files of other than three channels need tifffile, which cannot be imported "
            f"({error}): install it with pip install tifffile."
        ) from error
    return tifffile.TiffFile(path).series[0]


def as_rgb(values: np.ndarray) -> np.ndarray:
    """``(H, W, C)`` -> ``(H, W, 3)`` to be looked at: the first three channels, or one as gray."""
    if values.shape[2] == 3:
        return values
    if values.shape[2] < 3:
        return np.repeat(values[:, :, :1], 3, axis=2)
    return np.ascontiguousarray(values[:, :, :3])


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """From `low` to `high` becomes from 0 to 255, rounded; what lies outside is cut off."""
    if values.dtype == np.uint16:  # a table is quick, and small where floats would fill the memory
        return _scaled(np.arange(65536), low, high)[values]
    exact = values if values.dtype.kind == "f" else values.astype(np.float64)
    shares = (exact - low) * (255 / (high - low))
    return (shares.clip(0, 255) + 0.5).astype(np.uint8)


def _checked_range(value_range: Any) -> tuple[float, float]:
    try:
        low, high = value_range
        if not (_is_number(low) and _is_number(high) and low < high and np.isfinite(high - low)):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"data.value_range={value_range} must be [BLACK,WHITE], two numbers of which the first "
            "is lower, or null for the range of the type."
        ) from error
    return low, high


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
