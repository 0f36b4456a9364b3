"""Plain vision transformer of the Co-DETR ViT-L release: EVA-02 with windowed attention.

Rotary positions, attention in windows or over the whole map, and a gated feed-forward network
(SwiGLU) with a normalization inside (paper: Fang et al., 2023); the levels that are made of its
one map, and the learning rates that fall from block to block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.utils import (
    PatchEmbed,
    get_abs_pos,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from co_detr.errors import ConfigError
from co_detr.modeling.backbones.swin import drop_paths, init_transformer

NORM_EPS = 1e-6


class VisionTransformer(Backbone):
    """Patches, absolute and rotary positions, blocks of windowed and of global attention.

    One output, ``last`` at the stride of the patches; `ViTPyramid` makes levels of it.

    Args:
        embed_dim: width C.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: width of the feed-forward network over C.
        window_size: side of the windows in tokens.
        global_blocks: numbers of the blocks that attend to the whole map.
        drop_path_rate: of the last block, see `drop_paths`.
        patch_size: side of a patch in pixels.
        pretrain_image_size: side in pixels of the square images that the table of absolute
            positions stands for; it is resized to the map.
        size_divisibility: images are padded to multiples of it.
        square_size: images are padded to a square of this side in pixels, which none may exceed;
            0: they are not. For training on squares (large-scale jitter).
        activation_checkpointing: in training, keep only the input of every block and compute the
            block again in the backward pass.

    Raises:
        ConfigError: if heads cannot share the width in multiples of 4 channels, a global block
            does not exist, or patches do not divide the padded images.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        window_size: int,
        global_blocks: Sequence[int],
        drop_path_rate: float,
        patch_size: int = 16,
        pretrain_image_size: int = 512,
        size_divisibility: int = 32,
        square_size: int = 0,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        # Two coordinates turn pairs of channels.
        if embed_dim % (4 * num_heads):
            raise ConfigError(
                f"ViT needs embed_dim divisible by 4 * num_heads, got {embed_dim} and {num_heads}."
            )
        missing = [block for block in global_blocks if not 0 <= block < depth]
        if missing:
            raise ConfigError(f"ViT has no blocks {missing} of global_blocks, only 0..{depth - 1}.")
        if size_divisibility % patch_size or square_size % patch_size or size_divisibility <= 0:
            raise ConfigError(
                f"ViT needs size_divisibility and square_size to be multiples of patch_size "
                f"{patch_size}, got {size_divisibility} and {square_size}."
            )
        self.head_dim = embed_dim // num_heads
        self.patch_size = patch_size
        self.window_size = window_size
        self.activation_checkpointing = activation_checkpointing
        self._size_divisibility = size_divisibility
        self.square_size = square_size

        side = pretrain_image_size // patch_size
        self.patch_embed = PatchEmbed(
            (patch_size, patch_size), (patch_size, patch_size), embed_dim=embed_dim
        )
        # The first position is that of a class token, which detection does without.
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + side * side, embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(
            ViTBlock(
                channels=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                window_size=0 if index in global_blocks else window_size,
                drop_path=drop_path,
            )
            for index, drop_path in enumerate(drop_paths(drop_path_rate, depth))
        )
        self.out_norm = nn.LayerNorm(embed_dim)
        self.apply(init_transformer)

        self._out_features = ["last"]
        self._out_feature_channels = {"last": embed_dim}
        self._out_feature_strides = {"last": patch_size}

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"square_size": self.square_size} if self.square_size else {}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``(B, 3, H, W)`` -> ``{"last": (B, C, H / patch, W / patch)}``.

        Raises:
            ValueError: if H or W is no multiple of the patch's side.
        """
        if images.shape[-2] % self.patch_size or images.shape[-1] % self.patch_size:
            raise ValueError(
                f"ViT needs images padded to multiples of {self.patch_size}, "
                f"got {tuple(images.shape)}"
            )
        x = self.patch_embed(images)
        height, width = x.shape[1:3]
        x = x + get_abs_pos(self.pos_embed, True, (height, width))
        of_map = self.rotary_table(height, width, x)
        of_window = self.rotary_table(self.window_size, self.window_size, x)
        for block in self.blocks:
            rotary = of_window if block.window_size else of_map
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary)
        return {"last": self.out_norm(x).permute(0, 3, 1, 2).contiguous()}

    def rotary_table(self, height: int, width: int, like: Tensor) -> RotaryTable:
        """The rotary positions of ``height`` x ``width`` tokens, on the device of ``like``."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return RotaryTable.of_map(height, width, self.head_dim, device=like.device, dtype=dtype)


@dataclass(frozen=True)
class RotaryTable:
    """Cosine and sine of every channel's angle at every token, both ``(H * W, D)``.

    D is the width of an attention head.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of_map(
        cls, height: int, width: int, head_dim: int, *, device: torch.device, dtype: torch.dtype
    ) -> RotaryTable:
        """The table of a map or window of ``height`` x ``width`` tokens.

        The first half of a head's channels turns with the row, the second with the column.
        Positions are stretched to the 16 x 16 tokens of the pretraining, whatever the map's size.
        """
        channels = head_dim // 2
        exponent = torch.arange(0, channels, 2, device=device).to(dtype) / channels
        frequencies = 1.0 / 10000**exponent  # one per pair of neighboring channels

        def angles(length: int) -> Tensor:
            position = torch.arange(length, device=device).to(dtype) / length * 16
            return (position[:, None] * frequencies).repeat_interleave(2, dim=1)

        rows = angles(height)[:, None].expand(height, width, channels)
        columns = angles(width)[None].expand(height, width, channels)
        angle = torch.cat([rows, columns], dim=-1).flatten(0, 1)
        return cls(angle.cos(), angle.sin())

    def rotate(self, heads: Tensor) -> Tensor:
        """Turns each pair of neighboring channels of ``(..., H * W, D)`` by its angle."""
        first, second = heads.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-second, first], dim=-1).flatten(-2)
        # The table is kept in float32 at least, so half precision is left here and resumed after.
        return (heads * self.cos + turned * self.sin).to(heads.dtype)


class RotaryAttention(nn.Module):
    """Multi-head self-attention with rotary positions; keys have no bias."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels, bias=False)
        self.v_proj = nn.Linear(channels, channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, rotary: RotaryTable) -> Tensor:
        """``(B, H, W, C)`` -> the same shape; every token attends to all of its map."""
        height, width = x.shape[1:3]

        def split_heads(projected: Tensor) -> Tensor:
            # (B, H, W, C) -> (B, heads, H * W, D)
            return projected.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        query = rotary.rotate(split_heads(self.q_proj(x)))
        key = rotary.rotate(split_heads(self.k_proj(x)))
        value = split_heads(self.v_proj(x))
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2).unflatten(1, (height, width)))


class SwiGLU(nn.Module):
    """Feed-forward network ``w3(norm(silu(w1 x) * w2 x))``."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(channels, hidden)
        self.w2 = nn.Linear(channels, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=NORM_EPS)
        self.w3 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` -> the same shape."""
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class ViTBlock(nn.Module):
    """Pre-norm attention and feed-forward network.

    Args:
        channels: width C.
        num_heads: attention heads.
        mlp_ratio: width of the hidden layer over C, rounded down.
        window_size: side in tokens of the windows that attention stays in; 0: the whole map. Maps
            are padded to whole windows, and the padding is attended to, as in the reference.
        drop_path: of both residual branches.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_heads: int,
        mlp_ratio: float,
        window_size: int,
        drop_path: StochasticDepth,
    ):
        super().__init__()
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(channels, eps=NORM_EPS)
        self.attn = RotaryAttention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels, eps=NORM_EPS)
        self.mlp = SwiGLU(channels, int(channels * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor, rotary: RotaryTable) -> Tensor:
        """``(B, H, W, C)`` -> the same shape. ``rotary`` is of the window, or of the whole map."""
        x = x + self.drop_path(self._attend(self.norm1(x), rotary))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, rotary: RotaryTable) -> Tensor:
        if not self.window_size:
            return self.attn(x, rotary)
        windows, padded = window_partition(x, self.window_size)
        windows = self.attn(windows, rotary)
        return window_unpartition(windows, self.window_size, padded, x.shape[1:3])


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``(B, C, H, W)``.

    A subclass of `nn.LayerNorm`, so that optimizers recognize its weights as those of a norm.
    """

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ViTPyramid(Backbone):
    """Wraps a one-map backbone of stride 16; outputs ``p2`` .. ``p6``, strides 4 .. 64.

    Every level is made from the same map by its own chain: nearest-neighbor upsampling and 3x3
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
