"""Channel mapper: a backbone's feature maps at one width, plus coarser extra levels."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from co_detr.errors import ConfigError


class ChannelMapper(Backbone):
    """Wraps any Detectron2 backbone, as ``FPN`` does, without a top-down path.

    Every chosen map gets a 1x1 convolution and GroupNorm. Extra levels are stride-2 3x3
    convolutions; the first one reads the last *backbone* map, each further one the level before.
    Source: Deformable-DETR section 4.1; mmdet ``ChannelMapper``.

    Args:
        bottom_up: backbone that returns a dict of maps.
        in_features: names of its outputs to use, finest first.
        out_channels: width C of every level.
        num_extra_levels: coarser levels to add.
        num_groups: groups of the normalisation; None: no normalisation but a bias (DETR).

    Raises:
        ConfigError: if ``bottom_up`` lacks one of ``in_features``.
    """

    def __init__(
        self,
        *,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int,
        num_extra_levels: int = 1,
        num_groups: int | None = 32,
    ):
        super().__init__()
        shapes = bottom_up.output_shape()
        missing = [name for name in in_features if name not in shapes]
        if missing:
            raise ConfigError(
                f"backbone.in_features names {missing}, but the backbone only returns "
                f"{sorted(shapes)}; add them to its out_features or change in_features."
            )
        self.bottom_up = bottom_up
        self.in_features = list(in_features)
        inputs = [shapes[name] for name in self.in_features]

        def unit(in_channels: int, kernel_size: int, stride: int) -> Conv2d:
            return Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride=stride,
                padding=kernel_size // 2,
                bias=num_groups is None,
                norm=None if num_groups is None else nn.GroupNorm(num_groups, out_channels),
            )

        self.lateral_convs = nn.ModuleList([unit(shape.channels, 1, 1) for shape in inputs])
        widths = [inputs[-1].channels] + [out_channels] * max(num_extra_levels - 1, 0)
        self.extra_convs = nn.ModuleList([unit(w, 3, 2) for w in widths[:num_extra_levels]])
        for conv in [*self.lateral_convs, *self.extra_convs]:
            nn.init.xavier_uniform_(conv.weight)

        strides = [shape.stride for shape in inputs]
        strides += [strides[-1] * 2 ** (i + 1) for i in range(num_extra_levels)]
        self._strides = {f"p{stride.bit_length() - 1}": stride for stride in strides}
        self._out_channels = out_channels

    @property
    def size_divisibility(self) -> int:
        return self.bottom_up.size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return self.bottom_up.padding_constraints

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=self._out_channels, stride=stride)
            for name, stride in self._strides.items()
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``(B, 3, H, W)`` -> maps ``(B, C, H/stride, W/stride)`` named p<log2 stride>."""
        features = self.bottom_up(images)
        maps = [
            conv(features[name])
            for conv, name in zip(self.lateral_convs, self.in_features, strict=True)
        ]
        coarsest = features[self.in_features[-1]]
        for conv in self.extra_convs:
            coarsest = conv(coarsest)
            maps.append(coarsest)
        return dict(zip(self._strides, maps, strict=True))
