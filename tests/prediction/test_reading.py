"""Images reach the model as they do in the evaluation, whatever they come as."""

import numpy as np
import pytest
from detectron2.config import instantiate
from PIL import Image

from co_detr.data.images import ImageReader
from co_detr.errors import DataError
from co_detr.tools.predict.predictor import Predictor
from tests.device import NAME


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_network_input_is_that_of_the_evaluation(trained, photos, image_format):
    overrides = [f"data.image_format={image_format}"]
    predictor = Predictor(trained.config, trained.checkpoint, device=NAME, overrides=overrides)
    mapper = instantiate(trained.cfg.dataloader.test.mapper)
    mapper.image_format = image_format
    path = str(photos / "a.png")
    assert predictor.prepare(path).image.equal(mapper({"file_name": path})["image"])


def test_the_range_of_a_run_is_that_of_its_predictions(trained, tmp_path):
    cfg = trained.cfg.copy()
    cfg.data.value_range = [1000, 3000]
    cfg.data.max_image_pixels = 5000
    path = str(tmp_path / "deep.png")
    values = np.random.default_rng(0).integers(900, 3100, (60, 80), dtype=np.uint16)
    Image.fromarray(values).save(path)
    predictor = Predictor(cfg, trained.checkpoint, device="cpu")
    assert predictor.reader == ImageReader((1000, 3000), 5000)
    sample = predictor.prepare(path)
    expected = ((values.astype(float).clip(1000, 3000) - 1000) / 2000 * 255 + 0.5).astype(np.uint8)
    assert np.array_equal(sample.rgb, np.repeat(expected[:, :, None], 3, 2))
    assert sample.image.equal(instantiate(cfg.dataloader.test.mapper)({"file_name": path})["image"])
    assert predictor.prepare(values).image.equal(sample.image)  # an array of the same values
    Image.new("L", (80, 70)).save(path)
    with pytest.raises(DataError, match="80x70 pixels has more than the 5,000"):
        predictor.prepare(path)
    larger = Predictor(cfg, trained.checkpoint, device="cpu", max_image_pixels=6000)
    assert larger.prepare(path).rgb.shape == (70, 80, 3)
    assert larger.reader.value_range == (1000, 3000)


@pytest.mark.parametrize("shape", [(900, 1), (1, 900), (3, 4000), (20000, 2)])
def test_images_that_are_very_thin_are_resized_to_at_least_one_pixel(predictor, shape):
    sample = predictor.prepare(np.zeros((*shape, 3), np.uint8))
    assert min(sample.image.shape[1:]) >= 1 and max(sample.image.shape[1:]) <= 160
    assert predictor(np.zeros((*shape, 3), np.uint8)).image_size == shape


def test_an_image_that_cannot_be_resized(predictor, monkeypatch):
    def fail(_):
        raise ValueError("height and width must be > 0")

    monkeypatch.setattr(predictor, "_resize", fail)
    with pytest.raises(DataError, match="^the image of 1x900 pixels cannot be resized"):
        predictor.prepare(np.zeros((900, 1, 3), np.uint8))
