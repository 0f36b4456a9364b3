"""The table that names every tensor of the reference implementation and of ours.

A table is a list of lines and is read in both directions; the first line that knows a key decides.
Which lines there are is read off the names of the model's tensors, so that Co-Deformable-DETR and
Co-DINO, with and without auxiliary heads and masks, need no switch.

Keys are written with placeholders: ``{i}``, ``{j}`` for a number, ``{leaf}`` for a name
without dots, ``{rest}`` for any tail. A line has the same placeholders on both sides.

The lines of the transformer backbones and of the pyramid of the ViT are read off the reference's
classes: ``SwinTransformerV1``, whose names Detectron2's Swin shares, and ``ViT`` with the neck
``SFP``. All names of its instance segmentation model with the ViT have a line; that released files
were written under these names is not checked. Swin weights under the names of mmdet's
``SwinTransformer``, which ports of the reference use, are known as well; there patch merging orders
its inputs otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from co_detr.modeling.backbones import SwinTransformer, VisionTransformer
from co_detr.modeling.backbones.vit import RotaryTable

if TYPE_CHECKING:
    from co_detr.modeling import CoDETR
    from co_detr.modeling.masks import RefineMaskHead

Rewrite: TypeAlias = Callable[[Tensor], Tensor]

TRANSFORMER = "query_head.transformer"
NO_AUXILIARY = "auxiliary heads, which this model does without"
NO_DENOISING = "labels of denoising queries, which this model does without"
NO_MASKS = "masks, which this model does without"
NO_MASK_SCORES = "scores of masks, which this model does without"
COUNTERS = "counters of batch norms, which are frozen here"
# mmdet's EMA hook swaps the two sets before it saves, so that the plain names hold the average.
EMA_COPIES = "the second set of weights of mmdet's EMA hook"
RATIOS = 3  # aspect ratios of RPN anchors
RELEASED_HEADS = ("roi", "atss")  # weights of others exist in our own files only
OURS = "backbone.bottom_up"
ROTARY = "rotary positions, which are computed from the size of the map here"

_PLACEHOLDERS = {"i": r"\d+", "j": r"\d+", "leaf": r"[^.]+", "rest": r".+"}


@dataclass(frozen=True)
class Row:
    """One tensor there is one tensor here.

    Attributes:
        official: key of the reference.
        ours: our key.
        rewrite: applied to the tensor on its way to us.
        restore: the inverse of ``rewrite``; both or none.
    """

    official: str
    ours: str
    rewrite: Rewrite | None = None
    restore: Rewrite | None = None

    def __post_init__(self) -> None:
        if (self.rewrite is None) != (self.restore is None):
            raise ValueError(f"the row of {self.official} needs both rewrite and restore, or none")

    def to_ours(self, key: str) -> str | None:
        """Our name of an official key, or None if the row does not know it."""
        return _translate(self.official, self.ours, key)

    def to_official(self, key: str) -> str | None:
        """The official name of one of our keys, or None if the row does not know it."""
        return _translate(self.ours, self.official, key)


@dataclass(frozen=True)
class SplitRow:
    """One table there, one tensor per line of it here.

    Attributes:
        official: key of the reference, of a tensor (n, ...).
        ours: our keys of its n slices, in order; no placeholders.
    """

    official: str
    ours: tuple[str, ...]


@dataclass(frozen=True)
class DroppedRow:
    """A tensor of the reference that we have no use for.

    Attributes:
        official: key of the reference.
        why: what a report says about it, such as "counters of batch norms, which are frozen here".
        beside: official key with the same placeholders, of a tensor that is there whenever this one
            is; None if nothing can bring this one back.
        restore: makes this tensor from the one of ``beside``.
    """

    official: str
    why: str
    beside: str | None = None
    restore: Rewrite | None = None

    def __post_init__(self) -> None:
        if (self.beside is None) != (self.restore is None):
            raise ValueError(f"the row of {self.official} needs both beside and restore, or none")

    def knows(self, key: str) -> bool:
        """Whether this official key is left out by this row."""
        return _pattern(self.official).fullmatch(key) is not None

    def restored_beside(self, key: str) -> str | None:
        """The key to restore beside the official ``key``, or None."""
        return None if self.beside is None else _translate(self.beside, self.official, key)


TableRow: TypeAlias = Row | SplitRow | DroppedRow


def zero_counter(beside: Tensor) -> Tensor:
    """A batch norm's ``num_batches_tracked`` that has counted nothing."""
    return torch.zeros((), dtype=torch.int64, device=beside.device)


def _translate(source: str, target: str, key: str) -> str | None:
    found = _pattern(source).fullmatch(key)
    return None if found is None else target.format(**found.groupdict())


@cache
def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for name, expression in _PLACEHOLDERS.items():
        pattern = pattern.replace(re.escape("{" + name + "}"), f"(?P<{name}>{expression})")
    return re.compile(pattern)


def table(model: CoDETR) -> list[TableRow]:
    """All lines for ``model``.

    Args:
        model: whose names are ours.
    """
    keys = model.state_dict().keys()
    is_dino = "decoder.output_norm.weight" in keys
    matched = f"queries.{model.queries.inference}"
    labels = [key for key in keys if re.fullmatch(r"queries\.\w+\.label_embedding\.weight", key)]
    return [
        DroppedRow("ema_{rest}", EMA_COPIES),
        *(transformer_backbone_rows(model.backbone) or _resnet_rows()),
        *_neck_rows(),
        *_transformer_rows(matched),
        *(_dino_rows(matched, labels) if is_dino else _plain_rows(matched)),
        *_branch_rows(matched, model.decoder.num_layers),
        *(_dropped_auxiliary_rows() if model.auxiliary is None else _auxiliary_rows(model, keys)),
        *mask_rows(model.mask_head),
    ]


def _resnet_rows() -> Iterable[TableRow]:
    ours = "backbone.bottom_up"
    yield Row("backbone.conv1.weight", f"{ours}.stem.conv1.weight")
    yield DroppedRow(
        "backbone.{rest}.num_batches_tracked",
        COUNTERS,
        beside="backbone.{rest}.running_var",
        restore=zero_counter,
    )
    yield Row("backbone.bn1.{leaf}", f"{ours}.stem.conv1.norm.{{leaf}}")
    for stage in (1, 2, 3, 4):
        theirs, here = f"backbone.layer{stage}.{{i}}", f"{ours}.res{stage + 1}.{{i}}"
        yield Row(f"{theirs}.conv{{j}}.weight", f"{here}.conv{{j}}.weight")
        yield Row(f"{theirs}.bn{{j}}.{{leaf}}", f"{here}.conv{{j}}.norm.{{leaf}}")
        yield Row(f"{theirs}.downsample.0.weight", f"{here}.shortcut.weight")
        yield Row(f"{theirs}.downsample.1.{{leaf}}", f"{here}.shortcut.norm.{{leaf}}")


def _neck_rows() -> Iterable[TableRow]:
    for theirs, ours in (("convs", "lateral_convs"), ("extra_convs", "extra_convs")):
        yield Row(f"neck.{theirs}.{{i}}.conv.{{leaf}}", f"backbone.{ours}.{{i}}.{{leaf}}")
        yield Row(f"neck.{theirs}.{{i}}.gn.{{leaf}}", f"backbone.{ours}.{{i}}.norm.{{leaf}}")


def _transformer_rows(matched: str) -> Iterable[TableRow]:
    yield Row(f"{TRANSFORMER}.level_embeds", "encoder.level_embed")
    yield from _layer_rows("encoder", ["attention"])
    yield from _layer_rows("decoder", ["self_attention", "cross_attention"])
    yield Row(f"{TRANSFORMER}.enc_output.{{leaf}}", f"{matched}.memory_proj.{{leaf}}")
    yield Row(f"{TRANSFORMER}.enc_output_norm.{{leaf}}", f"{matched}.memory_norm.{{leaf}}")


def _layer_rows(part: str, attentions: list[str]) -> Iterable[TableRow]:
    theirs, here = f"{TRANSFORMER}.{part}.layers.{{i}}", f"{part}.layers.{{i}}"
    for number, name in enumerate(attentions):
        # mmcv wraps nn.MultiheadAttention one level deeper
        inner = "attn.{rest}" if name == "self_attention" else "{rest}"
        yield Row(f"{theirs}.attentions.{number}.{inner}", f"{here}.{name}.{{rest}}")
    yield Row(f"{theirs}.ffns.0.layers.0.0.{{leaf}}", f"{here}.ffn.linear1.{{leaf}}")
    yield Row(f"{theirs}.ffns.0.layers.1.{{leaf}}", f"{here}.ffn.linear2.{{leaf}}")
    for number, name in enumerate([*attentions, "ffn"]):
        yield Row(f"{theirs}.norms.{number}.{{leaf}}", f"{here}.{name}_norm.{{leaf}}")


def _plain_rows(matched: str) -> Iterable[TableRow]:
    """What Co-Deformable-DETR has besides the common parts."""
    yield Row("query_head.query_embedding.weight", f"{matched}.content.weight")
    yield Row(f"{TRANSFORMER}.pos_trans.{{leaf}}", f"{matched}.position_proj.{{leaf}}")
    yield Row(f"{TRANSFORMER}.pos_trans_norm.{{leaf}}", f"{matched}.position_norm.{{leaf}}")


def _dino_rows(matched: str, labels: list[str]) -> Iterable[TableRow]:
    """What Co-DINO has besides the common parts."""
    yield Row(f"{TRANSFORMER}.query_embed.weight", f"{matched}.content.weight")
    yield Row(f"{TRANSFORMER}.decoder.norm.{{leaf}}", "decoder.output_norm.{leaf}")
    for theirs, ours in ((0, 0), (2, 1)):  # the activation between has no weights
        yield Row(
            f"{TRANSFORMER}.decoder.ref_point_head.{theirs}.{{leaf}}",
            f"decoder.query_position.layers.{ours}.{{leaf}}",
        )
    label_embedding = "query_head.label_embedding.weight"
    if labels:
        yield Row(label_embedding, labels[0])
    else:
        yield DroppedRow(label_embedding, NO_DENOISING)


def _branch_rows(matched: str, num_layers: int) -> Iterable[TableRow]:
    """Class and box heads; the reference keeps those of the encoder behind the decoder's."""
    encoder, decoder = f"{num_layers}", "{i}"
    yield Row(f"query_head.cls_branches.{encoder}.{{leaf}}", f"{matched}.class_head.{{leaf}}")
    yield Row(f"query_head.cls_branches.{decoder}.{{leaf}}", "decoder.class_heads.{i}.{leaf}")
    for theirs, ours in ((0, 0), (2, 1), (4, 2)):  # the activations between have no weights
        yield Row(
            f"query_head.reg_branches.{encoder}.{theirs}.{{leaf}}",
            f"{matched}.box_head.layers.{ours}.{{leaf}}",
        )
        yield Row(
            f"query_head.reg_branches.{decoder}.{theirs}.{{leaf}}",
            f"decoder.box_heads.{{i}}.layers.{ours}.{{leaf}}",
        )


def _auxiliary_rows(model: CoDETR, keys: Iterable[str]) -> Iterable[TableRow]:
    yield Row("query_head.downsample.0.{leaf}", "auxiliary.pyramid.conv.{leaf}")
    yield Row("query_head.downsample.1.{leaf}", "auxiliary.pyramid.conv.norm.{leaf}")
    names = [name for name in model.auxiliary.heads if name in RELEASED_HEADS]
    embeddings = tuple(f"auxiliary.positive_queries.{name}.head_embedding" for name in names)
    yield SplitRow(f"{TRANSFORMER}.head_pos_embed.weight", embeddings)
    for number, name in enumerate(names):
        ours = f"auxiliary.positive_queries.{name}"
        for theirs, here in (
            ("aux_pos_trans", "position_proj"),
            ("aux_pos_trans_norm", "position_norm"),
            ("pos_feats_trans", "feature_proj"),
            ("pos_feats_norm", "feature_norm"),
        ):
            yield Row(f"{TRANSFORMER}.{theirs}.{number}.{{leaf}}", f"{ours}.{here}.{{leaf}}")
    if "roi" in names:
        yield from _roi_rows(keys)
    if "atss" in names:
        yield from _atss_rows()


def _roi_rows(keys: Iterable[str]) -> Iterable[TableRow]:
    rpn, roi = "auxiliary.heads.roi.rpn.rpn_head", "auxiliary.heads.roi.roi_heads"
    yield Row("rpn_head.rpn_conv.{leaf}", f"{rpn}.conv.{{leaf}}")
    for theirs, here, width in (("cls", "objectness_logits", 1), ("reg", "anchor_deltas", 4)):
        yield Row(
            f"rpn_head.rpn_{theirs}.{{leaf}}",
            f"{rpn}.{here}.{{leaf}}",
            rewrite=_sizes_outside(width),
            restore=_ratios_outside(width),
        )
    theirs = "roi_head.0.bbox_head"
    # Shared layers are counted from 0 there and from 1 in Detectron2.
    layers = {found[1] for key in keys if (found := re.search(r"roi_heads\.box_head\.(\w+)", key))}
    for number in (int(name[4:]) for name in layers if name.startswith("conv")):
        shared = f"{theirs}.shared_convs.{number - 1}"
        yield Row(f"{shared}.conv.{{leaf}}", f"{roi}.box_head.conv{number}.{{leaf}}")
        yield Row(f"{shared}.gn.{{leaf}}", f"{roi}.box_head.conv{number}.norm.{{leaf}}")
    for number in (int(name[2:]) for name in layers if name.startswith("fc")):
        shared = f"{theirs}.shared_fcs.{number - 1}"
        yield Row(f"{shared}.{{leaf}}", f"{roi}.box_head.fc{number}.{{leaf}}")
    yield Row(f"{theirs}.fc_cls.{{leaf}}", f"{roi}.box_predictor.cls_score.{{leaf}}")
    yield Row(f"{theirs}.fc_reg.{{leaf}}", f"{roi}.box_predictor.bbox_pred.{{leaf}}")


def _atss_rows() -> Iterable[TableRow]:
    theirs, atss = "bbox_head.0", "auxiliary.heads.atss"
    for tower, here in (("cls_convs", "class_tower"), ("reg_convs", "box_tower")):
        yield Row(f"{theirs}.{tower}.{{i}}.conv.{{leaf}}", f"{atss}.{here}.{{i}}.{{leaf}}")
        yield Row(f"{theirs}.{tower}.{{i}}.gn.{{leaf}}", f"{atss}.{here}.{{i}}.norm.{{leaf}}")
    yield Row(f"{theirs}.atss_cls.{{leaf}}", f"{atss}.class_logits.{{leaf}}")
    yield Row(f"{theirs}.atss_reg.{{leaf}}", f"{atss}.box_deltas.{{leaf}}")
    yield Row(f"{theirs}.atss_centerness.{{leaf}}", f"{atss}.centerness.{{leaf}}")
    yield Row(f"{theirs}.scales.{{i}}.scale", f"{atss}.scales.{{i}}")


def mask_rows(mask_head: RefineMaskHead | None) -> Iterable[TableRow]:
    """The mask head of Co-DINO-Inst and its head of mask scores, which is a part of ours."""
    head, scores = "mask_head", "mask_head.iou_head"
    if mask_head is None:
        yield DroppedRow(f"{head}.{{rest}}", NO_MASKS)
    if mask_head is None or mask_head.iou_head is None:
        yield DroppedRow("mask_iou_head.{rest}", NO_MASK_SCORES)
    for theirs, ours in (
        (f"{head}.instance_convs", f"{head}.instance_convs"),
        (f"{head}.semantic_convs", f"{head}.semantic_convs"),
        ("mask_iou_head.convs", f"{scores}.convs"),
    ):
        yield Row(f"{theirs}.{{i}}.conv.{{leaf}}", f"{ours}.{{i}}.{{leaf}}")
        yield Row(f"{theirs}.{{i}}.norm_layer.{{leaf}}", f"{ours}.{{i}}.norm.{{leaf}}")
    fusion = "fuse_conv.1"
    for theirs, ours in (
        ("semantic_transform_in", "semantic_conv"),
        ("fuse_conv.0", "fuse_conv"),
        *((f"{fusion}.dilation_conv_{n + 1}.conv", f"fusion.branches.{n}") for n in range(3)),
        (f"{fusion}.merge_conv.conv", "fusion.merge_conv"),
        ("fuse_transform_out", "out_conv"),
    ):
        stage = f"{head}.stages.{{i}}"
        yield Row(f"{stage}.{theirs}.{{leaf}}", f"{stage}.{ours}.{{leaf}}")
    yield Row(f"{head}.stage_instance_logits.{{i}}.{{leaf}}", f"{head}.logits.{{i}}.{{leaf}}")
    yield Row("mask_iou_head.fcs.0.{leaf}", f"{scores}.fc.{{leaf}}")
    yield Row("mask_iou_head.fc_mask_iou.{leaf}", f"{scores}.iou.{{leaf}}")


def _dropped_auxiliary_rows() -> Iterable[TableRow]:
    for prefix in ("query_head.downsample", "rpn_head", "roi_head", "bbox_head"):
        yield DroppedRow(f"{prefix}.{{rest}}", NO_AUXILIARY)
    for name in ("aux_pos_trans", "aux_pos_trans_norm", "pos_feats_trans", "pos_feats_norm"):
        yield DroppedRow(f"{TRANSFORMER}.{name}.{{rest}}", NO_AUXILIARY)
    yield DroppedRow(f"{TRANSFORMER}.head_pos_embed.weight", NO_AUXILIARY)


def _sizes_outside(width: int) -> Rewrite:
    """Reorders RPN output channels: the reference loops its three ratios outside the sizes,
    Detectron2 inside. ``width`` is the number of channels per anchor."""

    def rewrite(value: Tensor) -> Tensor:
        grouped = value.unflatten(0, (RATIOS, -1, width))
        return grouped.transpose(0, 1).flatten(0, 2).contiguous()

    return rewrite


def _ratios_outside(width: int) -> Rewrite:
    """The inverse of `_sizes_outside`."""

    def rewrite(value: Tensor) -> Tensor:
        grouped = value.unflatten(0, (-1, RATIOS, width))
        return grouped.transpose(0, 1).flatten(0, 2).contiguous()

    return rewrite


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
        def make(neighbor: Tensor) -> Tensor:
            # float32 even where the parameters are stored in half precision, as in the reference
            table = RotaryTable.of_map(
                side, side, vit.head_dim, device=neighbor.device, dtype=torch.float32
            )
            return getattr(table, part)

        return make

    for part in ("cos", "sin"):
        yield DroppedRow(f"{prefix}.freqs_{part}", ROTARY, beside, restore(part))


def _pyramid_rows() -> Iterator[Row]:
    for level in range(2, 7):
        yield Row(f"neck.p{level}.{{rest}}", f"backbone.levels.p{level}.{{rest}}")
