"""From values of tokens to maps over the image, which padding never reaches."""

import pytest
import torch
import torch.nn.functional as F

from co_detr.modeling.geometry import shrink_mask
from co_detr.tools.analyze.discriminability import LevelLayout, fold, score_maps
from tests.modeling.builders import geometry_of


def _shapes(padded):
    return [(-(-padded[0] // stride), -(-padded[1] // stride)) for stride in (8, 16, 32)]


@pytest.mark.parametrize("size, padded", [((90, 70), (96, 128)), ((33, 65), (33, 65))])
def test_cells_inside_are_those_that_the_encoder_does_not_mask(size, padded):
    shapes = _shapes(padded)
    layout = LevelLayout(size, padded, shapes)
    mask = geometry_of([size], padded).padding_mask
    for level, shape in enumerate(shapes):
        inside = ~shrink_mask(mask, *shape)[0]
        rows, columns = layout.cells_inside(level)
        assert inside.sum() == rows * columns and inside[:rows, :columns].all()


def test_equation_7():
    size, generator = (64, 96), torch.Generator().manual_seed(0)
    layout = LevelLayout(size, size, _shapes(size))
    values = [torch.rand(shape, generator=generator) * 5 for shape in layout.level_shapes]
    maps = score_maps(values, layout)
    resized = [
        F.interpolate((level / level.max())[None, None], size, mode="bilinear")[0, 0]
        for level in values
    ]
    for found, expected in zip(maps.levels, resized, strict=True):
        torch.testing.assert_close(found, expected)
        assert found.shape == size and 0 <= found.min() and found.max() <= 1
    torch.testing.assert_close(maps.fused, sum(resized) / 3)
    assert list(maps.named()) == ["fused", "level 1", "level 2", "level 3"]


def test_padding_changes_nothing():
    size, padded = (64, 48), (64, 96)
    layout = LevelLayout(size, padded, _shapes(padded))
    generator = torch.Generator().manual_seed(0)
    values = [torch.rand(shape, generator=generator) for shape in layout.level_shapes]
    alone = LevelLayout(size, size, _shapes(size))
    expected = score_maps(
        [level[: shape[0], : shape[1]] for level, shape in zip(values, _shapes(size), strict=True)],
        alone,
    )
    for level, shape in zip(values, _shapes(size), strict=True):
        level[:, shape[1] :] = 1e6
    torch.testing.assert_close(score_maps(values, layout).fused, expected.fused)


def test_a_level_of_zeros_scores_zero():
    layout = LevelLayout((16, 16), (16, 16), [(2, 2)])
    assert not score_maps([torch.zeros(2, 2)], layout).fused.any()


def test_fold_gives_every_level_its_tokens():
    first, second = fold(torch.arange(8), [(2, 3), (1, 2)])
    assert first.tolist() == [[0, 1, 2], [3, 4, 5]] and second.tolist() == [[6, 7]]
