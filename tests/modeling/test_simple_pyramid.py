"""The pyramid that auxiliary heads of a single-scale encoder read."""

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import nn

from co_detr.errors import ConfigError
from co_detr.modeling.auxiliary import SimplePyramid
from tests.device import DEVICE
from tests.modeling.builders import random_memory

STRIDES = [8, 16, 32, 64, 128]


def make_pyramid(strides=STRIDES, stride=32):
    pyramid = SimplePyramid(embed_dim=32, strides=strides, stride=stride, num_groups=8)
    return pyramid.to(DEVICE).double()


def memory_of(height, width):
    return random_memory([(height, width)], [(32 * height, 32 * width)])


@pytest.mark.parametrize(
    ("size", "shapes"),
    [
        ((5, 7), [(20, 28), (10, 14), (5, 7), (3, 4), (2, 2)]),
        ((4, 6), [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]),
        ((1, 1), [(4, 4), (2, 2), (1, 1), (1, 1), (1, 1)]),
    ],
)
def test_shapes(size, shapes):
    memory = memory_of(*size)
    maps = make_pyramid()(memory)
    assert list(maps) == ["p3", "p4", "p5", "p6", "p7"]
    assert [tuple(level_map.shape) for level_map in maps.values()] == [
        (1, 32, *shape) for shape in shapes
    ]
    # The level of the encoder's stride is its own map.
    assert torch.equal(maps["p5"], memory.maps()[0])


def test_other_strides():
    assert list(make_pyramid([8, 16, 32, 64])(memory_of(4, 4))) == ["p3", "p4", "p5", "p6"]
    assert list(make_pyramid([16, 32], stride=16)(memory_of(4, 4))) == ["p4", "p5"]


class Center(nn.Module):
    """In place of a convolution: the middle of its window, every ``stride`` cells."""

    def __init__(self, conv):
        super().__init__()
        self.stride = conv.stride[0]

    def forward(self, x):
        return x[..., :: self.stride, :: self.stride]


def test_cells_lie_where_anchors_are():
    """A map of positions in pixels stays one at finer levels; offset 0.5 has cell centers."""
    pyramid = make_pyramid()
    pyramid.finer = nn.ModuleList([Center(conv) for conv in pyramid.finer])
    memory = memory_of(4, 6)
    x = 32 * (torch.arange(6.0).double() + 0.5).expand(4, 6)
    y = 32 * (torch.arange(4.0).double() + 0.5)[:, None].expand(4, 6)
    with torch.no_grad():
        memory.tokens[:, :, 0], memory.tokens[:, :, 1] = x.flatten(), y.flatten()
    maps = list(pyramid(memory).values())[:3]
    anchors = DefaultAnchorGenerator(
        sizes=[[32]], aspect_ratios=[1.0], strides=STRIDES[:3], offset=0.5
    ).to(DEVICE)
    for level, boxes in zip(maps, anchors(maps), strict=True):
        centers = boxes.get_centers().view(*level.shape[2:], 2).double()
        difference = level[0, :2].detach() - centers.permute(2, 0, 1)
        # Interpolation repeats the outermost values, so the borders are not linear.
        border = {4: 0, 8: 1, 16: 3}[len(centers)]
        inner = difference[:, border : len(centers) - border, border : centers.shape[1] - border]
        assert inner.numel() and inner.abs().max() < 1e-9


def test_every_level_trains_the_encoder():
    memory = memory_of(5, 7)
    for level_map in make_pyramid()(memory).values():
        (gradient,) = torch.autograd.grad((level_map**2).sum(), memory.tokens, retain_graph=True)
        assert gradient.any()


@pytest.mark.parametrize("strides", [[8, 16], [8, 32, 64], [32, 16], [12, 24]])
def test_strides_that_do_not_fit(strides):
    with pytest.raises(ConfigError, match="must double from level to level and contain"):
        make_pyramid(strides)


def test_a_memory_of_several_levels():
    with pytest.raises(ConfigError, match="reads an encoder of one level, this has 4: take Extra"):
        make_pyramid()(random_memory())
