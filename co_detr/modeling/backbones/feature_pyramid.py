"""Levels of several strides from the single map of a plain vision transformer."""

from __future__ import annotations

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from co_detr.errors import ConfigError


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``(B, C, H, W)``.

    A subclass of `nn.LayerNorm`, so that optimisers recognise its weights as those of a norm.
    """

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ViTPyramid(Backbone):
    """Wraps a one-map backbone of stride 16; outputs ``p2`` .. ``p6``, strides 4 .. 64.

    Every level is made from the same map by its own chain: nearest-neighbour upsampling and 3x3
    convolutions to finer levels, max-pooling to coarser ones, then a 1x1 and a 3x3 convolution of
    the output width. ``SFP`` of the reference; unlike the simple feature pyramid of ViTDet it has
    no transposed convolutions.

    Args:
        bottom_up: backbone with a single output of stride 16.
        out_channels: width C of every level.

    Raises:
        ConfigError: if ``bottom_up`` has another number of outputs or another stride.
    """

    def __init__(self, *, bottom_up: Backbone, out_channels: int):
        super().__init__()
        shapes = bottom_up.output_shape()
        if [shape.stride for shape in shapes.values()] != [16]:
            raise ConfigError(
                f"ViTPyramid needs a backbone with one map of stride 16, got {shapes}; use "
                "ChannelMapper for a backbone with several maps."
            )
        self.bottom_up = bottom_up
        (self.in_feature,) = shapes
        self.out_channels = out_channels
        width = shapes[self.in_feature].channels
        out = out_channels
        self.levels = nn.ModuleDict(
            {
                "p2": _chain(
                    nn.Upsample(scale_factor=2),
                    _conv(width, width // 2, 3),
                    nn.Upsample(scale_factor=2),
                    _conv(width // 2, width // 4, 3),
                    _conv(width // 4, out, 1),
                    _conv(out, out, 3),
                ),
                "p3": _chain(
                    nn.Upsample(scale_factor=2),
                    _conv(width, width // 2, 3),
                    _conv(width // 2, out, 1),
                    _conv(out, out, 3),
                ),
                "p4": _chain(_conv(width, out, 1), _conv(out, out, 3)),
                "p5": _chain(_half(), _conv(width, out, 1), _conv(out, out, 3)),
                "p6": _chain(
                    _half(),
                    _conv(width, width, 3, stride=2),
                    _conv(width, out, 1),
                    _conv(out, out, 3),
                ),
            }
        )
        for module in self.levels.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    @property
    def size_divisibility(self) -> int:
        return self.bottom_up.size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return self.bottom_up.padding_constraints

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=self.out_channels, stride=2 ** int(name[1:]))
            for name in self.levels
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``(B, 3, H, W)`` -> maps ``(B, C, H/stride, W/stride)`` named p<log2 stride>."""
        features = self.bottom_up(images)[self.in_feature]
        return {name: level(features) for name, level in self.levels.items()}


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
    )


def _half() -> nn.MaxPool2d:
    return nn.MaxPool2d(kernel_size=3, stride=2, padding=1)


def _chain(*modules: nn.Module) -> nn.Sequential:
    """A norm after every convolution, and GELU between a norm and what follows it."""
    layers: list[nn.Module] = []
    for module in modules:
        if layers and isinstance(layers[-1], ChannelNorm):
            layers.append(nn.GELU())
        layers.append(module)
        if isinstance(module, nn.Conv2d):
            layers.append(ChannelNorm(module.out_channels))
    return nn.Sequential(*layers)
