"""Images reach the model as they do in the evaluation, whatever they come as."""

import numpy as np
import pytest
from detectron2.config import instantiate
from detectron2.data.detection_utils import read_image
from PIL import Image

from co_detr.errors import DataError
from co_detr.prediction import Predictor
from co_detr.prediction.images import read_rgb
from tests.device import NAME

ORIENTATION = 274  # number of the EXIF tag


@pytest.fixture
def pixels():
    return np.random.default_rng(1).integers(0, 256, (6, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, pixels, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(pixels).save(path, exif=exif)
    found = read_rgb(path)
    assert found.shape == ((6, 9, 3) if orientation < 5 else (9, 6, 3))
    assert np.array_equal(found, pixels) == (orientation == 1)
    with Image.open(path) as opened:
        assert np.array_equal(read_rgb(opened), found)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg"), ("1", "png")]
)
def test_modes(tmp_path, pixels, mode, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(pixels).convert(mode).save(path)
    found = read_rgb(str(path))
    assert found.shape == (6, 9, 3) and found.dtype == np.uint8
    assert np.array_equal(found, read_image(str(path), "RGB"))
    with Image.open(path) as opened:
        assert opened.mode == mode
        assert np.array_equal(read_rgb(opened), found)


def test_sixteen_bits_are_read_as_in_training(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 200, 40000]], dtype=np.uint16)).save(path)
    found = read_rgb(path)
    assert np.array_equal(found, read_image(str(path), "RGB"))
    assert found[0, :, 0].tolist() == [0, 200, 255]


def test_arrays(pixels):
    assert np.array_equal(read_rgb(pixels), pixels)
    assert np.array_equal(read_rgb(pixels[:, ::-1]), pixels[:, ::-1])
    alpha = np.full((6, 9, 1), 7, dtype=np.uint8)
    assert np.array_equal(read_rgb(np.concatenate([pixels, alpha], axis=2)), pixels)
    grey = np.repeat(pixels[:, :, :1], 3, axis=2)
    assert np.array_equal(read_rgb(pixels[:, :, :1]), grey)
    assert np.array_equal(read_rgb(pixels[:, :, 0]), grey)


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((4, 5, 3)), np.zeros((3, 4, 5), np.uint8), np.zeros((0, 5, 3), np.uint8), 3, b"a"],
    ids=["floats", "channels first", "empty", "a number", "bytes"],
)
def test_what_is_no_image(wrong):
    with pytest.raises(DataError, match="is not an image: pass"):
        read_rgb(wrong)


def test_missing_and_damaged_files(tmp_path, pixels):
    with pytest.raises(DataError, match="nowhere.jpg does not exist"):
        read_rgb(tmp_path / "nowhere.jpg")
    whole = tmp_path / "a.jpg"
    Image.fromarray(pixels).resize((90, 60)).save(whole)
    content = whole.read_bytes()
    for number, length in enumerate((0, 10, len(content) - 40)):
        path = tmp_path / f"cut{number}.jpg"
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=f"cut{number}.jpg cannot be decoded"):
            read_rgb(path)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_network_input_is_that_of_the_evaluation(trained, photos, image_format):
    overrides = [f"data.image_format={image_format}"]
    predictor = Predictor(trained.config, trained.checkpoint, device=NAME, overrides=overrides)
    mapper = instantiate(trained.cfg.dataloader.test.mapper)
    mapper.image_format = image_format
    path = str(photos / "a.png")
    assert predictor.prepare(path).image.equal(mapper({"file_name": path})["image"])


def test_an_image_that_is_too_thin(predictor):
    with pytest.raises(DataError, match="the image of 1 x 900 pixels cannot be resized"):
        predictor(np.zeros((900, 1, 3), np.uint8))
