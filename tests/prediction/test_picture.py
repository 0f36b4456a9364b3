"""Drawn pictures: frames and labels where they belong, the rest of the image as it was."""

import numpy as np
import pytest

from co_detr.tools.draw.boxes import Box, class_colors, draw_picture, text_color

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
