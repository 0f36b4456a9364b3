"""Quarter turns, colors and blur of training images, by themselves and beside copy-paste."""

import colorsys

import detectron2.data.transforms as T
import numpy as np
import pytest

from co_detr.data.augmentation import (
    ColorMap,
    PixelwiseTransform,
    PlaceTransform,
    RandomQuarterTurn,
    Variation,
    detr_train_augmentation,
)
from co_detr.data.copy_paste import window_of
from co_detr.data.masks import picked_pixels
from co_detr.errors import ConfigError
from co_detr.seeding import locally_seeded

IMAGE = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)


def test_quarter_turns_are_those_of_numpy():
    seen = set()
    for seed in range(40):
        with locally_seeded(seed):
            turn = RandomQuarterTurn(prob=0.8).get_transform(IMAGE)
        turned = T.TransformList([turn]).apply_image(IMAGE)
        (turns,) = (k for k in range(4) if np.array_equal(turned, np.rot90(IMAGE, k)))
        seen.add(turns)
        # The corners of a pixel go where the pixel goes.
        x, y = 7, 3
        marked = np.zeros(IMAGE.shape[:2])
        marked[y, x] = 1
        ((row, column),) = np.argwhere(np.rot90(marked, turns))
        box = T.TransformList([turn]).apply_box(np.array([[x, y, x + 1, y + 1]], float))[0]
        assert box.tolist() == [column, row, column + 1, row + 1]
    assert seen == {0, 1, 2, 3}


def test_masks_and_windows_follow_turns_and_places():
    """Rows and columns are followed without pixels, also by copy-paste."""
    for seed in range(20):
        with locally_seeded(seed):
            turn = RandomQuarterTurn(prob=1.0).get_transform(IMAGE)
        size = turn.apply_image(IMAGE).shape[:2]
        put = PlaceTransform((2, -3), (2, 0, 12, 15), (17, 14))
        resize = T.ResizeTransform(17, 14, 34, 28)
        bitmap = IMAGE[:, :, 0] > 127
        picked = picked_pixels(T.TransformList([turn, put, resize]), bitmap.shape)
        shown = np.where((picked.rows[:, None] >= 0) & (picked.columns >= 0), 1, 0)
        shown *= bitmap[picked.rows][:, picked.columns]
        expected = put.apply_segmentation(turn.apply_segmentation(bitmap))
        expected = expected.repeat(2, axis=0).repeat(2, axis=1)
        assert np.array_equal(shown.T if picked.transposed else shown, expected)
        color = PixelwiseTransform(ColorMap.of(0.8, 1.2, 0.5, 0.1, "RGB"))
        steps = T.TransformList([T.CropTransform(4, 3, 20, 15), turn_of((15, 20), seed), color])
        window = slice(2, 9), slice(5, 14)
        assert np.array_equal(window_of(IMAGE, steps, window), steps.apply_image(IMAGE)[window])
        assert size in {(20, 30), (30, 20)}


def turn_of(size, seed):
    with locally_seeded(seed):
        return RandomQuarterTurn(prob=1.0).get_transform(np.zeros((*size, 3), np.uint8))


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_colors(order):
    def changed(color, *settings):
        pixel = np.array(color if order == "RGB" else color[::-1], np.uint8)
        found = ColorMap.of(*settings, order)(np.tile(pixel, (1, 1, 1)))[0, 0].tolist()
        return found if order == "RGB" else found[::-1]

    assert changed((10, 200, 90), 1, 1, 1, 0) == pytest.approx((10, 200, 90), abs=1)
    assert changed((10, 200, 90), 0.5, 1, 1, 0) == pytest.approx((5, 100, 45), abs=1)
    assert changed((10, 200, 90), 1, 0, 1, 0) == pytest.approx([127.5] * 3, abs=1)
    gray = 0.299 * 10 + 0.587 * 200 + 0.114 * 90
    assert changed((10, 200, 90), 1, 1, 0, 0) == pytest.approx([gray] * 3, abs=1)
    assert changed((90, 90, 90), 1, 1, 1, 0.3) == pytest.approx([90] * 3, abs=1)
    # A turn of the color circle is one of HSV's hue in the same direction, if not exactly as far.
    before = colorsys.rgb_to_hsv(0.6, 0.4, 0.4)[0]
    after = colorsys.rgb_to_hsv(*changed((153, 102, 102), 1, 1, 1, 0.1))[0]
    assert 0.05 < (after - before) % 1 < 0.15


def test_variations_are_drawn_from_their_ranges():
    every = Variation(brightness=0.4, contrast=0.3, saturation=0.5, hue=0.1, blur=0.5)
    assert not Variation().before() and not Variation().behind()
    assert len(Variation(vertical_flip=0.5, quarter_turns=0.5).before()) == 2
    results = []
    for seed in range(30):
        with locally_seeded(seed):
            seen = T.AugInput(IMAGE)
            transforms = T.AugmentationList(every.behind())(seen)
        assert seen.image.shape == IMAGE.shape and seen.image.dtype == np.uint8
        assert transforms.apply_box(np.array([[1.0, 2, 3, 4]])).tolist() == [[1, 2, 3, 4]]
        results.append(seen.image.std())
    assert max(results) > IMAGE.std() > min(results)


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match="variation.hue=0.7 must be from 0 to 0.5"):
        Variation(hue=0.7)
    with pytest.raises(ConfigError, match="variation.blur_sigma=.* smallest and the largest"):
        Variation(blur_sigma=(2, 1))


def test_a_log_says_what_is_applied():
    """With its numbers, and not where in memory it lies."""
    everything = Variation(0.5, 0.5, 0.1, 0.1, 0.1, 0.1, blur=0.2)
    steps = [*everything.before(), *detr_train_augmentation(), *everything.behind()]
    said = str(T.AugmentationList(steps))
    assert "0x" not in said
    assert "RandomApply(prob=0.5, AugmentationList[ResizeShortestEdge(short_edge_length=" in said
    assert "RandomApply(prob=0.2, RandomBlur(sigma=(" in said
