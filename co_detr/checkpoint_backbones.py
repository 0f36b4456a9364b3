"""Lines of the checkpoint table for the transformer backbones and the pyramid of the ViT.

Read off the reference's classes: ``SwinTransformerV1``, whose names Detectron2's Swin shares, and
``ViT`` with the neck ``SFP``. Not checked against released files; in particular it is assumed that
the reference's wrapper for activation checkpointing (fairscale) leaves the names of blocks alone.
Swin weights under the names of mmdet's ``SwinTransformer``, which ports of the reference use, are
known as well; there patch merging orders its inputs otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from co_detr.checkpoint_table import DroppedRow, Rewrite, Row, TableRow
from co_detr.modeling.backbones import SwinTransformer, VisionTransformer
from co_detr.modeling.backbones.vit_layers import RotaryTable

OURS = "backbone.bottom_up"
ROTARY = "rotary positions, which are computed from the size of the map here"


def transformer_backbone_rows(backbone: nn.Module, *, mmdet_swin: bool = False) -> list[TableRow]:
    """The lines of a model's backbone and of the neck made for it; none for a ResNet.

    Args:
        backbone: ``model.backbone``.
        mmdet_swin: give a Swin mmdet's names on the way back, see `has_mmdet_swin`. On the way to
            us both kinds of names are known.
    """
    bottom_up = getattr(backbone, "bottom_up", None)
    if isinstance(bottom_up, SwinTransformer):
        official, mmdet = list(_swin_rows()), list(_mmdet_swin_rows())
        return mmdet + official if mmdet_swin else official + mmdet
    if isinstance(bottom_up, VisionTransformer):
        return [*_vit_rows(bottom_up), *_pyramid_rows()]
    return []


def has_mmdet_swin(official_keys: Iterable[str]) -> bool:
    """Whether a checkpoint's Swin is mmdet's, by its names."""
    return any(key.startswith("backbone.stages.") for key in official_keys)


def unfold_to_cat_order(merged: Tensor) -> Tensor:
    """Reorders the last axis (4 * C) of a patch-merging weight or norm from mmdet's to ours.

    mmdet unfolds 2x2 patches: all four positions of channel 0, then of channel 1, ..., positions
    row by row. Detectron2 and the original Swin concatenate: all channels of one position after
    the other, positions column by column.
    """
    by_position = merged.unflatten(-1, (-1, 2, 2))  # (..., C, row, column)
    return by_position.movedim(-3, -1).transpose(-3, -2).flatten(-3).contiguous()


def cat_to_unfold_order(merged: Tensor) -> Tensor:
    """The inverse of `unfold_to_cat_order`."""
    by_position = merged.unflatten(-1, (2, 2, -1))  # (..., column, row, C)
    return by_position.transpose(-3, -2).movedim(-1, -3).flatten(-3).contiguous()


def _swin_rows() -> Iterator[Row]:
    for part in ("patch_embed.proj", "patch_embed.norm", "layers", "norm{i}"):
        yield Row(f"backbone.{part}.{{rest}}", f"{OURS}.{part}.{{rest}}")


def _mmdet_swin_rows() -> Iterator[Row]:
    yield Row("backbone.patch_embed.projection.{leaf}", f"{OURS}.patch_embed.proj.{{leaf}}")
    yield Row("backbone.patch_embed.norm.{leaf}", f"{OURS}.patch_embed.norm.{{leaf}}")
    yield Row("backbone.norm{i}.{leaf}", f"{OURS}.norm{{i}}.{{leaf}}")
    official, ours = "backbone.stages.{i}", f"{OURS}.layers.{{i}}"
    for theirs, here in (
        ("norm1", "norm1"),
        ("norm2", "norm2"),
        ("attn.w_msa", "attn"),
        ("ffn.layers.0.0", "mlp.fc1"),
        ("ffn.layers.1", "mlp.fc2"),
    ):
        yield Row(
            f"{official}.blocks.{{j}}.{theirs}.{{rest}}", f"{ours}.blocks.{{j}}.{here}.{{rest}}"
        )
    for part in ("reduction", "norm"):
        name = f"downsample.{part}.{{leaf}}"
        yield Row(f"{official}.{name}", f"{ours}.{name}", unfold_to_cat_order, cat_to_unfold_order)


def _vit_rows(vit: VisionTransformer) -> Iterator[TableRow]:
    yield Row("backbone.pos_embed", f"{OURS}.pos_embed")
    for part in ("patch_embed.proj", "out_norm"):
        yield Row(f"backbone.{part}.{{leaf}}", f"{OURS}.{part}.{{leaf}}")
    official, ours = "backbone.blocks.{i}", f"{OURS}.blocks.{{i}}"
    for name in ("q", "v"):  # keys have no bias
        yield Row(f"{official}.attn.{name}_bias", f"{ours}.attn.{name}_proj.bias")
    yield Row(f"{official}.attn.{{leaf}}.weight", f"{ours}.attn.{{leaf}}.weight")
    yield Row(f"{official}.attn.proj.bias", f"{ours}.attn.proj.bias")
    for part in ("norm1", "norm2", "mlp"):
        yield Row(f"{official}.{part}.{{rest}}", f"{ours}.{part}.{{rest}}")
    yield from _rotary_rows(vit)


def _rotary_rows(vit: VisionTransformer) -> Iterator[DroppedRow]:
    """The reference stores the table of windows, once for itself and once per windowed block; with
    images of one square size also that of whole maps, with the blocks that are left."""
    yield from _rotary_table("backbone.rope_win", "backbone.pos_embed", vit, vit.window_size)
    side = vit.square_size // vit.patch_size
    if side:
        yield from _rotary_table("backbone.rope_glb", "backbone.pos_embed", vit, side)
    for number, block in enumerate(vit.blocks):
        prefix = f"backbone.blocks.{number}.attn"
        if block.window_size or side:
            yield from _rotary_table(
                f"{prefix}.rope", f"{prefix}.proj.weight", vit, block.window_size or side
            )


def _rotary_table(
    prefix: str, beside: str, vit: VisionTransformer, side: int
) -> Iterator[DroppedRow]:
    def restore(part: str) -> Rewrite:
        def make(neighbour: Tensor) -> Tensor:
            # float32 even where the parameters are stored in half precision, as in the reference
            table = RotaryTable.of_map(
                side, side, vit.head_dim, device=neighbour.device, dtype=torch.float32
            )
            return getattr(table, part)

        return make

    for part in ("cos", "sin"):
        yield DroppedRow(f"{prefix}.freqs_{part}", ROTARY, beside, restore(part))


def _pyramid_rows() -> Iterator[Row]:
    for level in range(2, 7):
        yield Row(f"neck.p{level}.{{rest}}", f"backbone.levels.p{level}.{{rest}}")
