"""Images of other than three channels: read, resized, checked against the backbone, predicted."""

import detectron2.data.transforms as T
import numpy as np
import pytest
import tifffile
import torch
from detectron2.config import instantiate
from PIL import Image

from co_detr.checkpoint.saving import Checkpointer
from co_detr.data.augmentation import ChannelResize, ResizeShortestEdge
from co_detr.data.images import ImageReader, as_rgb
from co_detr.data.loader import CheckedDatasetMapper
from co_detr.engine.config import load_config
from co_detr.engine.config_yaml import save_config
from co_detr.errors import ConfigError, DataError
from co_detr.tools.predict.predictor import Predictor
from tests.device import DEVICE, NAME
from tests.modeling.builders import randomize, shrink
from tests.paths import config_path

CONFIG = "co_detr_convnext_t"
FIVE = ["data.channels=5", "model.backbone.bottom_up.in_channels=5"]


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 5), dtype=np.uint8)


@pytest.fixture
def files(pixels, tmp_path):
    """The same image in files of all kinds."""
    np.save(tmp_path / "last.npy", pixels)
    np.save(tmp_path / "first.npy", pixels.transpose(2, 0, 1))
    tifffile.imwrite(tmp_path / "last.tif", pixels, photometric="minisblack")
    tifffile.imwrite(tmp_path / "pages.TIFF", pixels.transpose(2, 0, 1), photometric="minisblack")
    return [tmp_path / name for name in ("last.npy", "first.npy", "last.tif", "pages.TIFF")]


def test_channels_stay_as_they_are(files, pixels):
    for source in (*files, pixels):
        assert np.array_equal(ImageReader(channels=5).read_rgb(source), pixels)


def test_one_channel_and_values_of_16_bits(tmp_path):
    deep = np.array([[0, 1000], [2000, 5000]], np.uint16)
    np.save(tmp_path / "deep.npy", deep)
    found = ImageReader((0, 2000), channels=1).read_rgb(tmp_path / "deep.npy")
    assert found.tolist() == [[[0], [128]], [[255], [255]]]
    with pytest.raises(DataError, match=r"set data.value_range=\[BLACK,WHITE\]"):
        ImageReader(channels=1).read_rgb(deep.astype(np.float32))


def test_what_cannot_be_read(files, tmp_path):
    reader = ImageReader(channels=5)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    np.save(tmp_path / "code.npy", np.array([{}]), allow_pickle=True)
    for name, message in {
        "a.png": "no .npy or TIFF file, from which images of 5 channels are read",
        "code.npy": "cannot be decoded",
        "nowhere.npy": "nowhere.npy does not exist: correct the path",
    }.items():
        with pytest.raises(DataError, match=message):
            reader.read_rgb(tmp_path / name)
    with pytest.raises(DataError, match=r"last.npy of uint8 .* \(40, 60, 5\) is no image of 4"):
        ImageReader(channels=4).read_rgb(files[0])
    with pytest.raises(DataError, match="60x40 pixels has more than the 100 that are allowed"):
        ImageReader(max_pixels=100, channels=5).read_rgb(files[0])
    with pytest.raises(ConfigError, match="data.channels=0 must be a whole number"):
        ImageReader(channels=0)


def test_each_channel_is_resized_as_a_gray_image(pixels):
    resize = ResizeShortestEdge(30).get_transform(pixels)
    found = resize.apply_image(pixels)
    assert isinstance(resize, ChannelResize) and found.shape == (30, 45, 5)
    for channel in range(5):
        gray = Image.fromarray(pixels[:, :, channel]).resize((45, 30), Image.BILINEAR)
        assert np.array_equal(found[:, :, channel], np.asarray(gray))
    colors = pixels[:, :, :3]
    plain = T.ResizeTransform(40, 60, 30, 45, Image.BILINEAR).apply_image(colors)
    assert np.array_equal(resize.apply_image(colors), plain)


def test_what_is_drawn(pixels):
    assert np.array_equal(as_rgb(pixels), pixels[:, :, :3])
    assert np.array_equal(as_rgb(pixels[:, :, 3:]), np.repeat(pixels[:, :, 3:4], 3, axis=2))


def test_training_samples(files):
    mapper = CheckedDatasetMapper(
        *(True, [ResizeShortestEdge(30), T.RandomFlip(prob=1.0)], "RGB"),
        reader=ImageReader(channels=5),
    )
    annotation = {"bbox": [10, 8, 20, 12], "bbox_mode": 1, "category_id": 0}
    record = {"file_name": str(files[0]), "height": 40, "width": 60, "annotations": [annotation]}
    sample = mapper(record)
    assert sample["image"].shape == (5, 30, 45) and sample["image"].dtype == torch.uint8
    assert len(sample["instances"]) == 1


def test_data_and_backbone_have_to_agree():
    for message, overrides in {
        "data.channels=5, but the backbone takes 3": FIVE[:1],
        "data.channels=3, but the backbone takes 5": FIVE[1:],
        "are for RGB: set data.image_format=RGB": ["data.image_format=BGR"],
        "dataloader.tta is for images of 3 channels, not of 5": [*FIVE, "dataloader.tta=flip"],
        "mixing.mosaic is for images of 3": [*FIVE, "dataloader.train.mixing.mosaic=0.5"],
        "variation.hue is for images of 3": [*FIVE, "dataloader.train.mapper.variation.hue=0.1"],
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_config(config_path(CONFIG), overrides)


def test_the_config_of_a_run_is_checked_as_well(tmp_path):
    """In which parts are named by texts."""
    path = str(tmp_path / "config.yaml")
    save_config(load_config(config_path(CONFIG)), path)
    assert load_config(path).data.image_format == "RGB"
    with pytest.raises(ConfigError, match="are for RGB: set data.image_format=RGB"):
        load_config(path, ["data.image_format=BGR"])


def test_prediction(files, pixels, tmp_path):
    short = "dataloader.test.mapper.augmentations.short_edge=64"
    cfg = shrink(load_config(config_path(CONFIG), [f"train.device={NAME}", short, *FIVE]))
    save_config(cfg, str(tmp_path / "config.yaml"))
    model = instantiate(cfg.model).to(DEVICE)
    assert model.pixel_mean.numel() == 5
    randomize(model)
    names = [f"class {index}" for index in range(cfg.model.num_classes)]
    Checkpointer(model, str(tmp_path), class_names=names).save("model_final")
    predictor = Predictor(tmp_path / "config.yaml", tmp_path / "model_final.pth", device=NAME)
    of_file, of_array = predictor([str(files[3]), pixels])
    assert len(of_file) > 0 and of_file.scores.equal(of_array.scores)
    changed = pixels.copy()
    changed[:, :, 4] = 255 - changed[:, :, 4]
    assert not predictor(changed).scores.equal(of_array.scores)
    assert predictor.prepare(pixels).rgb.shape == (40, 60, 3)
    with pytest.raises(ConfigError, match="tta and tiles are for images of 3 channels"):
        Predictor(tmp_path / "config.yaml", tmp_path / "model_final.pth", device=NAME, tiles=32)
