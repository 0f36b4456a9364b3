"""Augmentation of images of any shape; usual ones are augmented as Detectron2 does it."""

import detectron2.data.transforms as T
import numpy as np
import pytest
from PIL import Image

from co_detr.data.loader import (
    CheckedDatasetMapper,
    ResizeScale,
    ResizeShortestEdge,
    detr_test_augmentation,
    detr_train_augmentation,
    lsj_train_augmentation,
)
from co_detr.errors import DataError

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
