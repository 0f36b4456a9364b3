"""Swin Transformer, put together from Detectron2's blocks (paper: Liu et al., ICCV 2021).

Detectron2's own outer class cannot be used: it cannot be built on the meta device, takes its drop
path from `timm`, and its `size_divisibility` raises an error. Its blocks, its patch merging and
the names of its parameters stay; they are those of the reference's ``SwinTransformerV1``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.swin import (
    BasicLayer,
    PatchEmbed,
    PatchMerging,
    SwinTransformerBlock,
    window_partition,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from co_detr.errors import ConfigError

PATCH_SIZE = 4


class SwinTransformer(Backbone):
    """Swin-T, -S, -B or -L by its numbers. Outputs ``stage0`` .. ``stage3``, strides 4 .. 32.

    Args:
        embed_dim: channels of the first stage; every further stage has twice as many.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        window_size: side of a window in tokens.
        drop_path_rate: of the last block, see `drop_paths`.
        out_features: outputs, each with a LayerNorm of its own.
        size_divisibility: images are padded to multiples of it; 0 leaves them as they are. Any
            image size works: maps are padded where patches or windows do not fill them.
        activation_checkpointing: in training, keep only the input of every block and compute the
            block again in the backward pass.

    Raises:
        ConfigError: if ``depths`` and ``num_heads`` differ in length, or for an unknown output.
    """

    # The norms of the outputs: no classifier has them, so that files of ImageNet training do not.
    fresh_prefixes = ("norm0.", "norm1.", "norm2.", "norm3.")

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int,
        drop_path_rate: float,
        out_features: Sequence[str] = ("stage1", "stage2", "stage3"),
        size_divisibility: int = 0,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        if len(depths) != len(num_heads):
            raise ConfigError(
                f"Swin has {len(depths)} stages by depths but {len(num_heads)} by num_heads; "
                "give both one number per stage."
            )
        channels = {f"stage{index}": embed_dim * 2**index for index in range(len(depths))}
        unknown = [name for name in out_features if name not in channels]
        if unknown:
            raise ConfigError(f"Swin has no output {unknown}, only {list(channels)}.")

        self.patch_embed = PatchEmbed(
            patch_size=PATCH_SIZE, embed_dim=embed_dim, norm_layer=nn.LayerNorm
        )
        drop_path = drop_paths(drop_path_rate, sum(depths))
        self.layers = nn.ModuleList()
        for index, (width, depth, heads) in enumerate(
            zip(channels.values(), depths, num_heads, strict=True)
        ):
            start = sum(depths[:index])
            stage = SwinStage(
                channels=width,
                num_heads=heads,
                window_size=window_size,
                drop_path=drop_path[start : start + depth],
                merge=index < len(depths) - 1,
                activation_checkpointing=activation_checkpointing,
            )
            self.layers.append(stage)
        for index, (name, width) in enumerate(channels.items()):
            if name in out_features:
                self.add_module(f"norm{index}", nn.LayerNorm(width))
        self.apply(init_transformer)

        self._size_divisibility = size_divisibility
        self._out_features = [name for name in channels if name in out_features]
        self._out_feature_channels = channels
        self._out_feature_strides = {
            name: PATCH_SIZE * 2**index for index, name in enumerate(channels)
        }

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``(B, 3, H, W)`` -> maps ``(B, C, ceil(H / stride), ceil(W / stride))`` by name."""
        patches = self.patch_embed(images)
        height, width = patches.shape[-2:]
        tokens = patches.flatten(2).transpose(1, 2)
        maps = {}
        for index, stage in enumerate(self.layers):
            tokens = stage(tokens, height, width)
            name = f"stage{index}"
            if name in self._out_features:
                normed = getattr(self, f"norm{index}")(tokens)
                maps[name] = normed.transpose(1, 2).unflatten(2, (height, width)).contiguous()
            if stage.downsample is not None:
                tokens = stage.downsample(tokens, height, width)
                height, width = -(-height // 2), -(-width // 2)
        return maps


class SwinStage(BasicLayer):
    """Blocks of one resolution, then (except in the last stage) the merging of 2x2 patches.

    Every second block shifts its windows by half a window.

    Args:
        channels: width C.
        num_heads: attention heads.
        window_size: side of a window in tokens.
        drop_path: one per block.
        merge: whether the next stage halves the resolution.
        activation_checkpointing: see `SwinTransformer`.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_heads: int,
        window_size: int,
        drop_path: Sequence[StochasticDepth],
        merge: bool,
        activation_checkpointing: bool,
    ):
        super().__init__(
            dim=channels,
            depth=len(drop_path),
            num_heads=num_heads,
            window_size=window_size,
            downsample=PatchMerging if merge else None,
            use_checkpoint=activation_checkpointing,
        )
        for block, rate in zip(self.blocks, drop_path, strict=True):
            block.drop_path = rate

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """``(B, height * width, C)`` -> the same shape; ``merge`` is a step of its own."""
        mask = shift_mask(height, width, self.window_size, self.shift_size, tokens)
        for block in self.blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                tokens = checkpoint(
                    _run_block, block, tokens, mask, height, width, use_reentrant=False
                )
            else:
                tokens = _run_block(block, tokens, mask, height, width)
        return tokens


def _run_block(
    block: SwinTransformerBlock, tokens: Tensor, mask: Tensor, height: int, width: int
) -> Tensor:
    # Detectron2 passes the map's size in attributes. Setting them here, and not once per stage,
    # keeps a checkpointed block right when the model has seen another size in between.
    block.H, block.W = height, width
    return block(tokens, mask)


def shift_mask(height: int, width: int, window_size: int, shift: int, like: Tensor) -> Tensor:
    """Keeps apart, in windows of the rolled map, tokens that were not neighbors before.

    Args:
        height, width: size of the map before padding to whole windows.
        like: a tensor of the device and type that the mask shall have.

    Returns:
        ``(windows, T, T)`` to add to the attention scores, T = window_size squared: 0 or -100.
    """

    def part_of_axis(length: int) -> Tensor:
        padded = -(-length // window_size) * window_size
        index = torch.arange(padded, device=like.device)
        return (index >= padded - window_size).long() + (index >= padded - shift).long()

    parts = 3 * part_of_axis(height)[:, None] + part_of_axis(width)[None, :]
    parts = window_partition(parts[None, :, :, None], window_size).flatten(1)  # (windows, T)
    apart = parts[:, None, :] != parts[:, :, None]
    return like.new_zeros(apart.shape).masked_fill_(apart, -100.0)


def init_transformer(module: nn.Module) -> None:
    """For ``Module.apply``: linear layers from a truncated normal of deviation 0.02, no bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_paths(drop_path_rate: float, depth: int) -> list[StochasticDepth]:
    """One drop path per block; the rate grows linearly from 0 to ``drop_path_rate``.

    A drop path removes, in training, a residual branch of an image with its rate as probability,
    and scales the branch up where it stays.
    """
    # On the CPU by name: values are read, which a model built on the meta device cannot do.
    rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
    return [StochasticDepth(rate, "row") for rate in rates]
