"""Augmentation of images of any shape; usual ones are augmented as Detectron2 does it."""

import detectron2.data.transforms as T
import numpy as np
import pytest
from detectron2.config import instantiate
from PIL import Image

from co_detr.data.augmentation import (
    ResizeScale,
    ResizeShortestEdge,
    detr_test_augmentation,
    detr_train_augmentation,
    lsj_train_augmentation,
)
from co_detr.data.loader import CheckedDatasetMapper
from co_detr.engine.config import load_config
from co_detr.errors import ConfigError, DataError
from tests.paths import config_path

THIN = [(1, 1000), (3, 4000), (20000, 2), (1, 1), (1, 60000)]


def drawn(augmentation, size, seed):
    np.random.seed(seed)
    transform = augmentation.get_transform(np.empty((*size, 3), np.uint8))
    return transform.new_h, transform.new_w, np.random.random()


@pytest.mark.parametrize("size", [(480, 640), (1080, 1920), (33, 77), (600, 4000)])
def test_usual_images_are_resized_as_by_detectron2(size):
    crop_resize = detr_train_augmentation()[1].aug.augs[0]
    for seed in range(20):
        edges = {"short_edge_length": (400, 500, 600), "sample_style": "choice"}
        assert drawn(crop_resize, size, seed) == drawn(T.ResizeShortestEdge(**edges), size, seed)
        edges["max_size"] = 1333
        ours = ResizeShortestEdge(**edges)
        assert drawn(ours, size, seed) == drawn(T.ResizeShortestEdge(**edges), size, seed)
        scales = (0.1, 2.0, 1024, 1024)
        assert drawn(ResizeScale(*scales), size, seed) == drawn(T.ResizeScale(*scales), size, seed)


def test_crops_in_proportion_to_the_input():
    """None are DETR's numbers at its 800 pixels, and follow `short_edges` elsewhere."""

    def crop_of(*short_edges, **settings):
        resize, crop = detr_train_augmentation(short_edges, **settings)[1].aug.augs
        return tuple(resize.short_edge_length), tuple(crop.crop_size)

    relative = {"crop_short_edges": None, "crop_size": None}
    assert crop_of(480, 800, **relative) == crop_of(480, 800) == crop_of(96, 192)
    assert crop_of(192, 160, **relative) == ((96, 120, 144), (92, 144))
    key = "dataloader.train.mapper.augmentations"
    for edge in (192, 400):  # what the preflight advises for small objects
        cfg = load_config(config_path("co_detr_small"), [f"{key}.short_edges=[{edge}]"])
        resize, crop = instantiate(cfg.dataloader.train.mapper.augmentations)[1].aug.augs
        assert resize.short_edge_length[-1] == crop.crop_size[1] == edge * 3 / 4
    cfg = load_config(config_path("co_detr_small"), [f"{key}.crop_size=[64,96]"])
    assert instantiate(cfg.dataloader.train.mapper.augmentations)[1].aug.augs[1].crop_size == (
        64,
        96,
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.short_edges=800", "short_edges=800 must be a list of lengths in pixels"),
        ("train.short_edges=[]", r"short_edges=\[\] must be a list of lengths in pixels"),
        ("train.short_edges=[0]", "each length of .*short_edges=0 must be a whole number"),
        ("train.short_edges=[abc]", "each length of .*short_edges=abc must be a whole number"),
        ("train.max_size=0", "train.*max_size=0 must be a whole number of at least 1"),
        ("train.crop_probability=2", "crop_probability=2 must be from 0 to 1"),
        ("train.flip_probability=-0.5", "flip_probability=-0.5 must be from 0 to 1"),
        ("train.crop_short_edges=[]", r"crop_short_edges=\[\] must be a list of lengths"),
        ("train.crop_size=[96,64]", r"crop_size=\[96, 64\] must be the smallest and the largest"),
        ("train.crop_size=[96]", r"crop_size=\[96\] must be the smallest and the largest"),
        ("test.short_edge=0", "test.*short_edge=0 must be a whole number of at least 1"),
        ("test.max_size=1.5", "test.*max_size=1.5 must be a whole number of at least 1"),
    ],
)
def test_settings_out_of_range(override, message):
    """Refused at the start, where drawing from them would fail in the middle of a training."""
    split, _, setting = override.partition(".")
    cfg = load_config(
        config_path("co_detr_small"), [f"dataloader.{split}.mapper.augmentations.{setting}"]
    )
    with pytest.raises(ConfigError, match=message):
        instantiate(cfg.dataloader[split].mapper.augmentations)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "augmentations.size=0 must be a whole number"),
        ({"size": 64, "scales": (2.0, 0.1)}, "scales=.* must be the smallest and the largest"),
        ({"size": 64, "scales": (0.0, 1.0)}, "scales=.* above 0"),
        ({"size": 64, "flip_probability": 5}, "flip_probability=5 must be from 0 to 1"),
    ],
)
def test_settings_of_large_scale_jitter_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        lsj_train_augmentation(**settings)


@pytest.mark.parametrize("size", [(3, 4000), (4000, 3), (200, 2200)])
def test_no_image_becomes_huge_on_the_way_to_a_crop(size):
    resize = detr_train_augmentation()[1].aug.augs[0]
    assert all(max(drawn(resize, size, seed)[:2]) <= 4200 for seed in range(9))


@pytest.mark.parametrize("size", THIN)
@pytest.mark.parametrize(
    "steps",
    [
        detr_train_augmentation(crop_probability=1.0),
        detr_train_augmentation(crop_probability=0.0),
        lsj_train_augmentation(256),
        detr_test_augmentation(),
    ],
    ids=["crop", "no crop", "lsj", "test"],
)
def test_something_is_left_of_very_thin_images(size, steps):
    for seed in range(3):
        np.random.seed(seed)
        augmented = T.AugInput(np.zeros((*size, 3), np.uint8), boxes=np.array([[0.0, 0, 1, 1]]))
        T.AugmentationList(steps)(augmented)
        assert augmented.image.size and max(augmented.image.shape[:2]) <= 1333
        assert np.isfinite(augmented.boxes).all()


def record(path, size):
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path)
    height, width = size
    box = {"bbox": [0, 0, width, height], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    return {"file_name": str(path), "height": height, "width": width, "annotations": [box]}


def test_a_thin_image_in_training(tmp_path):
    mapper = CheckedDatasetMapper(True, detr_train_augmentation(crop_probability=0.0), "RGB")
    mapped = mapper(record(tmp_path / "a.png", (1, 60000)))
    assert mapped["image"].shape == (3, 1, 1333) and len(mapped["instances"]) == 1


def test_an_augmentation_that_fails_names_the_image(tmp_path):
    mapper = CheckedDatasetMapper(True, [T.ResizeShortestEdge(800, max_size=1333)], "RGB")
    with pytest.raises(DataError, match=r"a\.png of 60000x1 pixels cannot be resized or cropped"):
        mapper(record(tmp_path / "a.png", (1, 60000)))
