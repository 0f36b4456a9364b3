"""Drawn pictures: frames and labels where they belong, the rest of the image as it was."""

import numpy as np
import pytest

from co_detr.mask_patch import MaskPatch
from co_detr.tools.draw.boxes import Box, class_colors, draw_picture, paint_masks, text_color

COLORS = class_colors(["cat", "dog"])


@pytest.fixture
def rgb():
    return np.full((100, 140, 3), 128, np.uint8)


def test_frame_and_label(rgb):
    picture = np.asarray(draw_picture(rgb, [Box((20.0, 40.0, 50.0, 30.0), "dog", 0.9)], COLORS))
    assert picture.shape == rgb.shape and (rgb == 128).all()
    for y, x in ((40, 20), (40, 69), (69, 20), (69, 69)):  # the corner pixels of the box
        assert tuple(picture[y, x]) == COLORS["dog"]
    changed = np.argwhere((picture != 128).any(2))
    label_height = 40 - changed[:, 0].min()
    assert changed[:, 0].max() == 69 and changed[:, 1].min() == 20
    assert 8 < label_height < 20
    assert (picture[41:69, 21:69] == 128).all()


def test_labels_stay_inside(rgb):
    box = Box((100.0, 1.0, 40.0, 99.0), "dog", 0.87)
    picture = np.asarray(draw_picture(rgb, [box], COLORS))
    filled = (picture == COLORS["dog"]).all(2)
    assert filled[4].sum() > 20 and filled[5, :100].any()  # moved to the left, and below the edge


def test_without_boxes_nothing_changes(rgb):
    assert np.array_equal(np.asarray(draw_picture(rgb, [], COLORS)), rgb)


def test_boxes_without_area_are_drawn(rgb):
    draw_picture(rgb, [Box((30.0, 30.0, 0.2, 0.2), "cat", 0.5)], COLORS)


@pytest.mark.parametrize("count", [1, 10, 11, 80, 1203])
def test_colors_of_classes_differ(count):
    colors = class_colors([str(index) for index in range(count)])
    assert len(set(colors.values())) >= min(count, 256)
    values = np.array([*colors.values()], float)
    steps = np.abs(np.diff(values, axis=0)).sum(1)
    assert count == 1 or steps.min() > 60


@pytest.mark.parametrize("count", [3, 10, 80])
def test_labels_have_the_contrast_that_wcag_asks_of_text(count):
    def luminance(color):
        parts = np.array(color) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    for ground in class_colors([str(index) for index in range(count)]).values():
        text = {"black": 0.0, "white": 1.0}[text_color(ground)]
        darker, lighter = sorted((luminance(ground), text))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, ground


def disk(top, left, side):
    rows, columns = np.mgrid[:side, :side] - (side - 1) / 2
    return MaskPatch(left, top, rows**2 + columns**2 < (side / 2) ** 2)


def test_masks_are_soft_with_a_firm_contour(rgb):
    box = Box((20.0, 40.0, 40.0, 40.0), "dog", 0.9, disk(40, 20, 40))
    picture = paint_masks(rgb, [box], COLORS)
    assert (rgb == 128).all()
    expected = np.round(0.6 * 128 + 0.4 * np.array(COLORS["dog"]))
    assert (picture[60, 40] == expected).all()  # inside
    assert (picture[40, 40] == COLORS["dog"]).all()  # the contour
    assert (picture[43, 23] == 128).all()  # in the box, outside of the mask
    drawn = np.asarray(draw_picture(rgb, [box], COLORS))
    assert (drawn[60, 40] == expected).all()


def test_small_masks_are_in_front(rgb):
    large = Box((0.0, 0.0, 140.0, 100.0), "cat", 0.9, disk(0, 20, 100))
    small = Box((60.0, 40.0, 20.0, 20.0), "dog", 0.1, disk(40, 60, 20))
    painted = paint_masks(rgb, [small, large], COLORS)
    assert tuple(painted[49, 60]) == COLORS["dog"]
    red, blue = (np.array(COLORS[name], float) for name in ("cat", "dog"))
    expected = 0.6 * (0.6 * 128 + 0.4 * red).round() + 0.4 * blue
    assert np.abs(painted[50, 70] - expected).max() <= 1


def test_without_masks_nothing_is_copied(rgb):
    empty = MaskPatch(3, 3, np.zeros((0, 0), bool))
    boxes = [Box((1.0, 1.0, 9.0, 9.0), "dog"), Box((1.0, 1.0, 9.0, 9.0), "cat", mask=empty)]
    assert paint_masks(rgb, boxes, COLORS) is rgb
