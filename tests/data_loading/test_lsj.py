"""Large-scale jitter: sizes, boxes that stay on their objects, and independent crop offsets."""

import numpy as np
import pytest
from detectron2.data import transforms as T
from detectron2.data.detection_utils import transform_instance_annotations
from detectron2.structures import BoxMode

from co_detr.data.augmentation import detr_test_augmentation, lsj_train_augmentation
from co_detr.seeding import locally_seeded

SQUARE = 64
BOX = (30, 12, 70, 52)  # white on black


def _image(width=100, height=60):
    image = np.zeros((height, width, 3), np.uint8)
    image[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    return image


def _augmented(seed, image=None, **settings):
    image = _image() if image is None else image
    aug_input = T.AugInput(image)
    with locally_seeded("lsj", seed):
        applied = T.AugmentationList(lsj_train_augmentation(SQUARE, **settings))(aug_input)
    return aug_input.image, applied


def test_images_fit_in_the_square_and_cover_all_scales():
    sides = []
    for seed in range(200):
        image, _ = _augmented(seed)
        assert max(image.shape[:2]) <= SQUARE
        sides.append(image.shape[1])
    # A wide image is as wide as the square once its scale is 1 or more: half of the range.
    assert min(sides) < 0.2 * SQUARE
    assert np.mean(np.array(sides) == SQUARE) == pytest.approx(1 / 1.9, abs=0.1)


def test_size_is_the_drawn_share_of_the_square_as_in_the_reference():
    for share in (0.25, 0.5, 1.0):
        image, _ = _augmented(0, scales=(share, share))
        # Longer side on the share of the square, the other one in proportion, then rounded.
        assert image.shape[:2] == (int(60 * share * SQUARE / 100 + 0.5), share * SQUARE)


def test_boxes_stay_on_their_objects():
    visible = 0
    for seed in range(60):
        image, applied = _augmented(seed)
        annotation = {"bbox": BOX, "bbox_mode": BoxMode.XYXY_ABS}
        box = transform_instance_annotations(annotation, applied, image.shape[:2])["bbox"]
        white = np.argwhere(image[..., 0] > 127)
        if not len(white):
            assert min(box[2] - box[0], box[3] - box[1]) < 1
            continue
        visible += 1
        top_left, bottom_right = white.min(0), white.max(0) + 1
        np.testing.assert_allclose(box, [*top_left[::-1], *bottom_right[::-1]], atol=1.01)
    assert visible > 40


def test_crop_offsets_of_both_directions_are_independent():
    image = np.zeros((100, 100, 3), np.uint8)
    offsets = []
    for seed in range(80):
        _, applied = _augmented(seed, image, scales=(2.0, 2.0), flip_probability=0.0)
        crop = next(
            transform for transform in applied.transforms if isinstance(transform, T.CropTransform)
        )
        offsets.append((crop.x0, crop.y0))
    assert abs(np.corrcoef(np.array(offsets).T)[0, 1]) < 0.3


def test_testing_fills_the_longer_side():
    aug_input = T.AugInput(_image())
    T.AugmentationList(detr_test_augmentation(short_edge=SQUARE, max_size=SQUARE))(aug_input)
    assert aug_input.image.shape[:2] == (int(60 * SQUARE / 100 + 0.5), SQUARE)
