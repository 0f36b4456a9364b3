"""The one reader of images: what it makes of every kind of file, and that nothing else reads."""

import io
import multiprocessing
import re
import struct
import subprocess
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from co_detr.data.images import ImageReader, image_suffixes, orientation_of
from co_detr.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
ORIENTATION = 274  # number of the EXIF tag
READER = ImageReader()


@pytest.fixture
def pixels():
    return np.random.default_rng(1).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def test_nothing_else_opens_images():
    opens = re.compile(r"Image\.open\(|read_image|cv2\.imread|imageio|skimage\.io|plt\.imread")
    files = [ROOT / name for name in ("train_net.py", "predict.py", "demo.py")]
    files += [*(ROOT / "co_detr").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    found = [str(path.relative_to(ROOT)) for path in files if opens.search(path.read_text("utf-8"))]
    assert found == ["co_detr/data/images.py"]


def with_orientation(pixels, path, orientation, **options):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **options)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "mpo"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, pixels, suffix, orientation):
    path = tmp_path / f"turned.{suffix}"
    with_orientation(pixels.repeat(4, 0).repeat(4, 1), path, orientation)
    found = READER.read_rgb(path)
    assert found.shape == ((24, 36, 3) if orientation < 5 else (36, 24, 3))
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert np.array_equal(found, expected)
    with Image.open(path) as opened:
        assert orientation_of(opened) == orientation
        assert np.array_equal(READER.read_rgb(opened), found)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_deep_images(tmp_path, pixels, orientation):
    path = tmp_path / "deep.png"
    with_orientation(pixels[:, :, 0].astype(np.uint16) * 257, path, orientation)
    gray = tmp_path / "gray.png"
    with_orientation(pixels[:, :, 0], gray, orientation)
    assert np.array_equal(READER.read_rgb(path), READER.read_rgb(gray))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_broken_exif_data_count_as_none(tmp_path, pixels, value):
    path = tmp_path / "a.png"
    with_orientation(pixels, path, value)
    assert np.array_equal(READER.read_rgb(path), pixels)
    Image.fromarray(pixels).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff rubbish")
    assert np.array_equal(READER.read_rgb(path), pixels)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg"), ("1", "png")]
)
def test_files_of_8_bits_are_read_as_detectron2_reads_them(tmp_path, pixels, mode, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(pixels).convert(mode).save(path)
    found = READER.read_rgb(str(path))
    assert found.shape == (6, 9, 3) and found.dtype == np.uint8
    assert np.array_equal(found, read_image(str(path), "RGB"))
    # A range is about values of more than 8 bits only.
    assert np.array_equal(ImageReader((1000, 2000)).read_rgb(path), found)


@pytest.mark.parametrize(
    ("mode", "by"),
    [("LA", "L"), ("La", "LA"), ("PA", "P"), ("RGBa", "RGBA"), ("YCbCr", "RGB"), ("HSV", "RGB")],
)
def test_rare_modes(pixels, mode, by):
    smooth = Image.fromarray(np.full_like(pixels, (102, 102, 102)))
    image = smooth.convert("LA").convert(by).convert(mode) if mode == "La" else smooth.convert(by)
    found = READER.read_rgb(image.convert(mode))
    assert found.shape == pixels.shape and np.abs(found.astype(int) - 102).max() <= 2


def test_a_palette_with_transparency_keeps_its_colors(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "a.png", transparency=b"\x00\x80\xff")
    found = READER.read_rgb(tmp_path / "a.png")
    assert found.reshape(-1, 3).tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_the_first_of_several_frames(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 6), color) for color in ((255, 0, 0), (0, 0, 255))]
    path = tmp_path / f"frames.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert READER.read_rgb(path)[0, 0].tolist() == [255, 0, 0]


# Images with more than 8 bits.

VALUES = np.array([[0, 257, 1000, 2000, 3000, 65535]])


def gray_levels(path_or_array, value_range=None):
    found = ImageReader(value_range).read_rgb(path_or_array)
    assert found.dtype == np.uint8 and found.shape == (1, 6, 3)
    assert (found == found[:, :, :1]).all()
    return found[0, :, 0].tolist()


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_sixteen_bits_are_scaled_from_a_range_not_cut_off(tmp_path, suffix):
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(VALUES.astype(np.uint16)).save(path)
    assert gray_levels(path) == [0, 1, 4, 8, 12, 255]
    assert gray_levels(path, (1000, 3000)) == [0, 0, 0, 128, 255, 255]
    assert read_image(str(path), "RGB")[0, :, 0].tolist() != [0, 1, 4, 8, 12, 255]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_byte_orders(mode):
    order = ">" if mode.endswith("B") else "<"
    data = VALUES.astype(f"{order}u2").tobytes()
    assert gray_levels(Image.frombytes(mode, (6, 1), data)) == [0, 1, 4, 8, 12, 255]


def test_arrays_of_sixteen_bits():
    assert gray_levels(VALUES.astype(np.uint16)) == [0, 1, 4, 8, 12, 255]
    colors = np.repeat(VALUES.astype(np.uint16)[:, :, None], 4, 2)
    assert gray_levels(colors, (1000, 3000)) == [0, 0, 0, 128, 255, 255]
    assert gray_levels(VALUES.astype(np.float32), (1000, 3000)) == [0, 0, 0, 128, 255, 255]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
@pytest.mark.parametrize("form", ["tif", "image", "array"])
def test_values_whose_range_is_not_known_are_refused(tmp_path, kind, form):
    source = VALUES.astype(kind)
    if form != "array":
        source = Image.fromarray(source)
    if form == "tif":
        source.save(tmp_path / "a.tif")
        source = tmp_path / "a.tif"
    with pytest.raises(DataError, match=r"from 0 to 65535, .* data.value_range=\[BLACK,WHITE\]"):
        READER.read_rgb(source)
    assert gray_levels(source, (1000, 3000)) == [0, 0, 0, 128, 255, 255]
    assert gray_levels(source, [-65535, 65535]) == [128, 128, 129, 131, 133, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(tmp_path, value):
    values = VALUES.astype(np.float32)
    values[0, 2] = value
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="a.tif holds values that are NaN or infinite: write"):
        ImageReader((0, 1)).read_rgb(tmp_path / "a.tif")


def png_of_16_bits(values: np.ndarray, color_type: int) -> bytes:
    """A PNG file; Pillow writes none with colors of 16 bits."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def exactly(values, low, high):
    shares = (values.astype(float).clip(low, high) - low) / (high - low)
    return (shares * 255 + 0.5).astype(np.uint8)


@pytest.mark.parametrize(("color_type", "channels"), [(2, 3), (6, 4)])
def test_colors_of_16_bits_keep_all_their_bits(tmp_path, color_type, channels):
    values = np.random.default_rng(0).integers(0, 4096, (5, 7, channels), dtype=np.uint16)
    path = tmp_path / "colors.png"
    path.write_bytes(png_of_16_bits(values, color_type))
    reader = ImageReader((0, 4095))
    found = reader.read_rgb(path)
    assert np.array_equal(found, exactly(values[:, :, :3], 0, 4095))
    with Image.open(path) as opened:
        assert np.array_equal(reader.read_rgb(opened), found)
    assert np.array_equal(READER.read_rgb(path), exactly(values[:, :, :3], 0, 65535))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_colors_of_16_bits_in_tiff(tmp_path, order, compression):
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 4096, (40, 7, 3)).astype(f"{order}u2")
    options = {"photometric": "rgb", "byteorder": order, "compression": compression}
    tifffile.imwrite(tmp_path / "a.tif", values, rowsperstrip=16, **options)
    found = ImageReader((0, 4095)).read_rgb(tmp_path / "a.tif")
    assert np.array_equal(found, exactly(values, 0, 4095))
    planes = np.moveaxis(values, 2, 0)
    tifffile.imwrite(tmp_path / "b.tif", planes, planarconfig="separate", **options)
    with pytest.raises(DataError, match="b.tif cannot be decoded .*planes"):
        READER.read_rgb(tmp_path / "b.tif")


def test_kinds_of_tiff(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, VALUES.astype(np.uint16), photometric="miniswhite")
    assert gray_levels(path) == [255, 254, 251, 247, 243, 0]
    tifffile.imwrite(path, (VALUES + 3_000_000_000).astype(np.uint32), photometric="minisblack")
    shifted = (3_000_001_000, 3_000_003_000)
    assert gray_levels(path, shifted) == [0, 0, 0, 128, 255, 255]
    signed = np.array([[-128, -1, 0, 1, 126, 127]], np.int8)
    tifffile.imwrite(path, signed, photometric="minisblack")
    assert gray_levels(path) == [0, 127, 128, 129, 254, 255]
    signed = (VALUES // 2 - 1000).astype(np.int16)
    tifffile.imwrite(path, signed, photometric="minisblack")
    assert gray_levels(path, (-1000, 1000)) == [0, 16, 64, 128, 191, 255]
    tifffile.imwrite(path, VALUES.astype(np.float64))
    with pytest.raises(DataError, match="a.tif cannot be decoded .no format, or no variant"):
        READER.read_rgb(path)


def test_depth_that_is_lost_is_not_scaled_in_silence(tmp_path):
    path = tmp_path / "alpha.png"
    path.write_bytes(png_of_16_bits(np.full((1, 6, 2), 2000), 4))
    assert gray_levels(path) == [7] * 6
    with pytest.raises(DataError, match="data.value_range cannot be applied: save it as gray"):
        ImageReader((0, 4095)).read_rgb(path)


@pytest.mark.parametrize(
    "wrong", [0, "0,4095", [0], [0, 1, 2], [5, 5], [9, 0], [0, None], [0, float("nan")], [0, "1"]]
)
def test_a_wrong_range_is_explained(wrong):
    with pytest.raises(ConfigError, match=r"^data.value_range=.* must be \[BLACK,WHITE\], two"):
        ImageReader(wrong)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "many", True, float("inf")])
def test_a_wrong_limit_is_explained(wrong):
    with pytest.raises(ConfigError, match="^data.max_image_pixels=.* must be a whole number"):
        ImageReader(max_pixels=wrong)


# Arrays, and what is no image.


def test_arrays(pixels):
    assert np.array_equal(READER.read_rgb(pixels), pixels)
    assert np.array_equal(READER.read_rgb(pixels[:, ::-1]), pixels[:, ::-1])
    alpha = np.full((6, 9, 1), 7, dtype=np.uint8)
    assert np.array_equal(READER.read_rgb(np.concatenate([pixels, alpha], axis=2)), pixels)
    gray = np.repeat(pixels[:, :, :1], 3, axis=2)
    assert np.array_equal(READER.read_rgb(pixels[:, :, :1]), gray)
    assert np.array_equal(READER.read_rgb(pixels[:, :, 0]), gray)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 5, 3), bool),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((4, 5), complex),
        3,
        b"a",
    ],
    ids=["truths", "channels first", "empty", "complex", "a number", "bytes"],
)
def test_what_is_no_image(wrong):
    with pytest.raises(DataError, match="is not an image: pass"):
        READER.read_rgb(wrong)


def test_missing_and_damaged_files(tmp_path, pixels):
    with pytest.raises(DataError, match="nowhere.jpg does not exist"):
        READER.read_rgb(tmp_path / "nowhere.jpg")
    whole = tmp_path / "a.jpg"
    Image.fromarray(pixels).resize((90, 60)).save(whole)
    content = whole.read_bytes()
    for number, length in enumerate((0, 10, len(content) - 40)):
        path = tmp_path / f"cut{number}.jpg"
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=f"cut{number}.jpg cannot be decoded"):
            READER.read_rgb(path)


# Sizes.


@pytest.mark.parametrize("suffix", ["png", "tif", "ico", "gif"])
def test_the_limit_is_ours_and_not_pillows(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"large.{suffix}"
    Image.new("RGB", (200, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice as many
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path).load()
    assert READER.read_rgb(path).size
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(DataError, match="the 999 .*raise data.max_image_pixels") as caught:
        ImageReader(max_pixels=999).read_rgb(path)
    assert str(path) in str(caught.value)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_the_limit_holds_in_threads(tmp_path, monkeypatch):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with ThreadPoolExecutor(8) as pool:
        shapes = list(pool.map(lambda _: READER.read_rgb(tmp_path / "a.tif").shape, range(40)))
    assert shapes == [(100, 200, 3)] * 40 and Image.MAX_IMAGE_PIXELS == 1000


class _Read:
    """A data set of one image."""

    def __init__(self, reader, path):
        self.reader, self.path = reader, path

    def __len__(self):
        return 1

    def __getitem__(self, _):
        return self.reader.read_rgb(self.path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_settings_reach_loading_workers(tmp_path, monkeypatch, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((30, 40), 3000, np.uint16)).save(path)

    def load(reader):
        options = {"num_workers": 1, "batch_size": None, "multiprocessing_context": method}
        return next(iter(DataLoader(_Read(reader, path), **options)))

    assert load(ImageReader((2000, 4000), 1200)).unique().tolist() == [128]
    with pytest.raises(DataError) as caught:
        load(ImageReader(max_pixels=1199))
    assert caught.value.sentence.startswith(f"image {path} of 40x30 pixels has more than the 1,199")


def test_the_reader_starts_no_other_program(tmp_path, monkeypatch, pixels):
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **_: started.append(args))
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **_: started.append(args))
    path = tmp_path / "a.eps"
    Image.fromarray(pixels).save(path)
    disguised = tmp_path / "a.png"
    disguised.write_bytes(path.read_bytes())
    for source in (path, disguised, Image.open(path)):
        with pytest.raises(DataError, match="cannot be decoded"):
            READER.read_rgb(source)
    with pytest.raises(DataError, match="cannot be decoded"):
        READER.open(io.BytesIO(path.read_bytes()), "upload")
    assert not started


def test_endings_of_files():
    suffixes = image_suffixes()
    assert {
        ".jpg",
        ".jfif",
        ".mpo",
        ".png",
        ".tif",
        ".tiff",
        ".webp",
        ".gif",
        ".bmp",
        ".jp2",
    } <= suffixes
    assert not {".eps", ".ps", ".pdf", ".wmf", ".mpg", ".mpeg", ".h5", ".txt"} & suffixes
