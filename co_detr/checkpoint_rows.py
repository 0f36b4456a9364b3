"""The lines of the table for one model: backbone, neck, transformer, query and auxiliary heads.

Which lines there are is read off the names of the model's tensors, so that Co-Deformable-DETR and
Co-DINO, with and without auxiliary heads, need no switch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from co_detr.checkpoint_backbones import transformer_backbone_rows
from co_detr.checkpoint_table import DroppedRow, Rewrite, Row, SplitRow, TableRow, zero_counter

if TYPE_CHECKING:
    from co_detr.modeling import CoDETR

TRANSFORMER = "query_head.transformer"
NO_AUXILIARY = "auxiliary heads, which this model does without"
NO_DENOISING = "labels of denoising queries, which this model does without"
COUNTERS = "counters of batch norms, which are frozen here"
# mmdet's EMA hook swaps the two sets before it saves, so that the plain names hold the average.
EMA_COPIES = "the second set of weights of mmdet's EMA hook"
RATIOS = 3  # aspect ratios of RPN anchors
RELEASED_HEADS = ("roi", "atss")  # weights of others exist in our own files only


def table(model: CoDETR) -> list[TableRow]:
    """All lines for ``model``.

    Args:
        model: whose names are ours.
    """
    keys = model.state_dict().keys()
    is_dino = "decoder.output_norm.weight" in keys
    matched = f"queries.{list(model.queries).index(model.inference_source)}"
    labels = [key for key in keys if re.fullmatch(r"queries\.\d+\.label_embedding\.weight", key)]
    return [
        DroppedRow("ema_{rest}", EMA_COPIES),
        *(transformer_backbone_rows(model.backbone) or _resnet_rows()),
        *_neck_rows(),
        *_transformer_rows(matched),
        *(_dino_rows(matched, labels) if is_dino else _plain_rows(matched)),
        *_branch_rows(matched, model.decoder.num_layers),
        *(_dropped_auxiliary_rows() if model.auxiliary is None else _auxiliary_rows(model, keys)),
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
    yield Row(f"{theirs}.atss_centerness.{{leaf}}", f"{atss}.centreness.{{leaf}}")
    yield Row(f"{theirs}.scales.{{i}}.scale", f"{atss}.scales.{{i}}")


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
