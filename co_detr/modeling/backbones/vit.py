"""Plain vision transformer of the Co-DETR ViT-L release: EVA-02 with windowed attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.utils import PatchEmbed, get_abs_pos
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from co_detr.errors import ConfigError
from co_detr.modeling.backbones.common import drop_paths, init_transformer
from co_detr.modeling.backbones.vit_layers import RotaryTable, ViTBlock


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
