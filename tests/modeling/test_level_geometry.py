"""Where the cells of a padded batch's levels lie in the images."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import instantiate

from co_detr.engine.config import apply_overrides, load_config
from co_detr.errors import ConfigError
from co_detr.modeling import SinePosition
from co_detr.modeling.geometry import (
    cell_centers,
    shrink_mask,
    sine_features,
)
from co_detr.modeling.queries.sources import propose_grid
from co_detr.modeling.transformer import DeformableEncoder
from co_detr.structures import EncoderMemory
from tests.modeling.builders import geometry_of, shrink
from tests.paths import config_path

STRIDES = (8, 16, 32)
SIZES = [(176, 235), (192, 256), (101, 213)]  # height, width
PADDED = (192, 277)  # no multiple of a stride in width


def levels_with(strides):
    shapes = [(-(-PADDED[0] // stride), -(-PADDED[1] // stride)) for stride in STRIDES]
    return geometry_of(SIZES, PADDED).at_levels(shapes, strides, torch.float64)


def centers_in_pixels(shapes):
    """``(S, 2)`` xy of all cells, which are ``stride`` pixels wide wherever they are."""
    return torch.cat(
        [
            cell_centers(*shape, torch.zeros((), dtype=torch.float64)) * stride
            for shape, stride in zip(shapes, STRIDES, strict=True)
        ]
    )


def test_a_mask_shrinks_like_nearest_interpolation():
    for height, width in ((100, 120), (97, 31), (333, 810), (800, 1333), (64, 64)):
        rows = torch.arange(height)[:, None] % 7 < 3
        columns = torch.arange(width)[None] % 5 < 2
        mask = (rows ^ columns)[None]
        for stride in (4, 8, 16, 32, 64):
            size = (-(-height // stride), -(-width // stride))
            expected = F.interpolate(mask[:, None].float(), size=size)[:, 0].bool()
            assert shrink_mask(mask, *size).equal(expected)


def test_with_strides_a_token_is_at_its_pixels_on_every_level():
    levels = levels_with(STRIDES)
    shapes = levels.level_shapes
    points = levels.reference_points()  # (B, S, L, 2), 1 is the end of the padded level
    expected = centers_in_pixels(shapes)
    for level, ((height, width), stride) in enumerate(zip(shapes, STRIDES, strict=True)):
        pixels = points[:, :, level] * torch.tensor([width, height]) * stride
        torch.testing.assert_close(pixels, expected.expand_as(pixels))


def test_without_strides_the_last_cell_counts_as_whole():
    levels = levels_with(None)
    shapes, ratios = levels.level_shapes, levels.valid_ratios
    # 235 pixels are 7.3 cells of 32, 101 are 3.2.
    assert ratios[0, 2].tolist() == [8 / 9, 6 / 6]
    assert ratios[2, 2].tolist() == [7 / 9, 4 / 6]
    # So a token of the coarsest level is up to a cell away from where it is on the finest one.
    points = levels.reference_points()
    pixels = points[0, :, 0] * torch.tensor([shapes[0][1], shapes[0][0]]) * STRIDES[0]
    error = (pixels - centers_in_pixels(shapes))[:, 0][~levels.padding_mask[0]]
    assert error.abs().max() > 10


def test_with_strides_grid_priors_are_centered_on_their_cells():
    levels = levels_with(STRIDES)
    tokens = torch.zeros(*levels.padding_mask.shape, 4, dtype=torch.float64)
    _, logits = propose_grid(EncoderMemory(tokens, levels))
    expected = centers_in_pixels(levels.level_shapes)
    for image, (height, width) in enumerate(SIZES):
        usable = logits[image].isfinite().all(-1)
        assert usable.sum() > 200
        pixels = logits[image].sigmoid()[:, :2] * torch.tensor([width, height])
        torch.testing.assert_close(pixels[usable], expected[usable])


def test_with_strides_a_position_code_is_that_of_the_pixels():
    levels = levels_with(STRIDES)
    codes = levels.positions(SinePosition(8))
    for code, mask, (height, width), stride in zip(
        codes, levels.masks(), levels.level_shapes, STRIDES, strict=True
    ):
        code = code.transpose(1, 2).unflatten(2, (height, width))
        for image, size in enumerate(SIZES):
            inside = ~mask[image]
            for half, index, extent in ((0, 0, size[0]), (1, 1, size[1])):
                cells = torch.arange((height, width)[index], dtype=torch.float64) + 0.5
                features = sine_features(cells * stride / extent * (2 * math.pi), 4, 10000.0)
                shape = (height, 1, 4) if index == 0 else (1, width, 4)
                expected = features.view(shape).expand(height, width, 4)[inside]
                found = code[image, 4 * half : 4 * half + 4].permute(1, 2, 0)[inside]
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_sizes_that_all_strides_divide_give_the_same_either_way():
    sizes = [(64, 96), (128, 32)]
    shapes = [(128 // stride, 96 // stride) for stride in STRIDES]
    exact, counted = (geometry_of(sizes).at_levels(shapes, strides) for strides in (STRIDES, None))
    assert exact.valid_ratios.equal(counted.valid_ratios)


def test_one_stride_for_each_level():
    with pytest.raises(ConfigError, match=r"encoder.strides=\[8, 16\] .* each of the 3 levels"):
        DeformableEncoder(
            position_encoding=SinePosition(8),
            embed_dim=8,
            num_heads=2,
            num_levels=3,
            strides=[8, 16],
        )


@pytest.mark.parametrize(
    "config, override, maps",
    [
        ("co_detr_r50", "model.encoder.strides=[4,8,16,32]", r"\[8, 16, 32, 64\]"),
        ("co_dab_detr_r50", "model.encoder.stride=16", r"\[32\]"),
    ],
)
def test_strides_have_to_be_those_of_the_backbone(config, override, maps):
    cfg = shrink(load_config(config_path(config)))
    apply_overrides(cfg, [override])
    with pytest.raises(ConfigError, match=rf"maps of model.backbone have the strides {maps}"):
        instantiate(cfg.model)
