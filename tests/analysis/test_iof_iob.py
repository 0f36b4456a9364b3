"""The curves against a loop over pixels and thresholds, and the areas that are known."""

import numpy as np
import pytest
import torch

from co_detr.tools.analyze.discriminability import (
    MeanCurve,
    foreground_mask,
    has_curve,
    image_curve,
    thresholds,
)

SIZE = (13, 17)
BOXES = torch.tensor([[2.0, 1.5, 9.0, 6.5], [5.2, 4.0, 12.6, 12.9], [14.0, 0.0, 14.4, 13.0]])


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(SIZE, generator=generator, dtype=torch.float64)
    values[:3] = values[:3].round(decimals=1)  # ties, and values that are thresholds
    values[5, 5] = 1.0
    return values


def test_foreground_is_the_pixels_whose_center_is_in_a_box():
    mask = foreground_mask(BOXES, SIZE)
    for y in range(SIZE[0]):
        for x in range(SIZE[1]):
            inside = any(
                x1 <= x + 0.5 < x2 and y1 <= y + 0.5 < y2 for x1, y1, x2, y2 in BOXES.tolist()
            )
            assert mask[y, x] == inside
    assert mask.any() and not mask[:, 14:].any()  # the thin box has no pixel's center


def test_curve_against_a_loop(scores):
    mask = foreground_mask(BOXES, SIZE)
    curve = image_curve(scores, mask)
    limits = [*thresholds().tolist(), float("inf")]
    assert len(curve.iof) == len(curve.iob) == len(limits)
    for index in (*range(0, len(limits), 371), 1, len(limits) - 2, len(limits) - 1):
        hits = {True: 0, False: 0}
        for y in range(SIZE[0]):
            for x in range(SIZE[1]):
                hits[bool(mask[y, x])] += float(scores[y, x]) >= limits[index]
        assert curve.iof[index] == pytest.approx(hits[True] / mask.sum().item(), abs=1e-12)
        assert curve.iob[index] == pytest.approx(hits[False] / (~mask).sum().item(), abs=1e-12)
    assert (curve.iof[0], curve.iob[0], curve.iof[-1], curve.iob[-1]) == (1, 1, 0, 0)


def test_area_is_the_chance_that_an_object_pixel_scores_higher(scores):
    mask = foreground_mask(BOXES, SIZE)
    inside, outside = scores[mask][:, None], scores[~mask][None]
    expected = (inside > outside).double().mean() + (inside == outside).double().mean() / 2
    assert image_curve(scores, mask).auc == pytest.approx(expected.item(), abs=1e-3)


def test_areas_that_are_known():
    mask = foreground_mask(BOXES, SIZE)
    assert image_curve(mask.double(), mask).auc == 1
    assert image_curve(1 - mask.double(), mask).auc == 0
    for constant in (0.0, 0.37, 1.0):
        assert image_curve(torch.full(SIZE, constant), mask).auc == 0.5
    mask = torch.zeros(200, 200, dtype=torch.bool)
    mask[50:150, 20:90] = True
    noise = torch.rand(200, 200, generator=torch.Generator().manual_seed(0))
    assert image_curve(noise, mask).auc == pytest.approx(0.5, abs=0.02)


def test_scores_close_to_the_maximum_are_told_apart():
    mask = foreground_mask(BOXES, SIZE)
    scores = 1 - 1e-4 * (1 - mask.double()) - 1e-5 * torch.rand(SIZE, dtype=torch.float64)
    assert image_curve(scores, mask).auc == 1


def test_every_image_counts_alike(scores):
    mask = foreground_mask(BOXES, SIZE)
    perfect = torch.zeros(100, 100, dtype=torch.bool)
    perfect[:50] = True
    mean = MeanCurve()
    mean.add(scores, mask)
    mean.add(perfect.double(), perfect)
    one, other = image_curve(scores, mask), image_curve(perfect.double(), perfect)
    np.testing.assert_allclose(mean.curve.iof, (one.iof + other.iof) / 2)
    np.testing.assert_allclose(mean.curve.iob, (one.iob + other.iob) / 2)
    summary = mean.summary()
    assert summary["image_auc_mean"] == pytest.approx((one.auc + 1) / 2)
    assert summary["image_auc_standard_error"] == pytest.approx((1 - one.auc) / 2)


def test_images_without_objects_or_without_background_have_no_curve():
    assert not has_curve(foreground_mask(torch.zeros(0, 4), SIZE))
    assert not has_curve(foreground_mask(torch.tensor([[0.0, 0.0, 17.0, 13.0]]), SIZE))
    assert has_curve(foreground_mask(BOXES, SIZE))
