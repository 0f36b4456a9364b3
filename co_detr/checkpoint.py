"""Weights of the reference implementation -> our names, by one table.

The table lists every key of an official Co-DETR checkpoint. A key that no row matches, or a
parameter of ours that no key fills, is an error: nothing is dropped silently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from co_detr.errors import CheckpointError
from co_detr.modeling import CoDETR


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        official: key of the reference, with ``{i}``, ``{j}`` for numbers, ``{rest}`` for any tail.
        ours: key with the same placeholders; None for keys we have no use for.
        rewrite: applied to the tensor on its way to us.
    """

    official: str
    ours: str | None
    rewrite: Callable[[Tensor], Tensor] | None = None

    def match(self, key: str) -> str | None:
        """Our key, or None if the row does not apply. Only for rows with ``ours``."""
        found = self.pattern.fullmatch(key)
        return None if found is None else self.ours.format(**found.groupdict())

    @property
    def pattern(self) -> re.Pattern[str]:
        pattern = re.escape(self.official)
        for name, expression in (("i", r"\d+"), ("j", r"\d+"), ("rest", r".+")):
            pattern = pattern.replace(re.escape("{" + name + "}"), f"(?P<{name}>{expression})")
        return re.compile(pattern)


@dataclass(frozen=True)
class Conversion:
    """Tensors in our names, and the official keys that were left out on purpose or are unknown."""

    state_dict: dict[str, Tensor]
    ignored: list[str]
    unknown: list[str]


def rename_official(official: Mapping[str, Tensor], model: CoDETR) -> Conversion:
    """Renames and reorders official tensors, complete or not (also gradients, for example).

    Args:
        official: tensors by the reference's names.
        model: decides the number of layers and the heads. Without auxiliary heads their keys are
            left out and listed as ignored.
    """
    rows = _table(model)
    converted: dict[str, Tensor] = {}
    ignored, unknown = [], []
    for key, value in official.items():
        row = next((row for row in rows if row.pattern.fullmatch(key)), None)
        if row is None:
            unknown.append(key)
        elif row.ours is None:
            ignored.append(key)
        elif "{head}" in row.ours:
            # One (K, 1) table in the reference, one scalar per head here.
            for name, scalar in zip(_head_names(model), value, strict=True):
                converted[row.ours.format(head=name)] = scalar
        else:
            converted[row.match(key)] = value if row.rewrite is None else row.rewrite(value)
    return Conversion(converted, ignored, unknown)


def convert_official(official: Mapping[str, Tensor], model: CoDETR) -> Conversion:
    """Converts a complete official Co-Deformable-DETR state dict for ``model``.

    Raises:
        CheckpointError: naming unknown keys, unfilled parameters and differing shapes.
    """
    conversion = rename_official(official, model)
    converted = conversion.state_dict
    expected = model.state_dict()
    missing = [key for key in expected if key not in converted]
    unexpected = [key for key in converted if key not in expected]
    shapes = [
        f"{key} is {tuple(value.shape)} but the model has {tuple(expected[key].shape)}"
        for key, value in converted.items()
        if key in expected and value.shape != expected[key].shape
    ]
    problems = {
        "official keys without a counterpart": conversion.unknown,
        "parameters of the model that the checkpoint lacks": missing,
        "converted keys that the model lacks": unexpected,
        "shapes that differ": shapes,
    }
    if any(problems.values()):
        text = "; ".join(f"{what}: {_shorten(keys)}" for what, keys in problems.items() if keys)
        raise CheckpointError(
            f"The official checkpoint does not fit this model ({text}). Choose the config whose "
            "backbone, layers, classes and auxiliary heads are those of the checkpoint."
        )
    return conversion


def is_official(checkpoint: Mapping) -> bool:
    """Whether a loaded file was written by the reference implementation."""
    state = checkpoint.get("state_dict", checkpoint)
    return any(key.removeprefix("module.").startswith("query_head.") for key in state)


def official_state_dict(checkpoint: Mapping) -> dict[str, Tensor]:
    """The state dict inside a loaded official checkpoint, without wrappers and prefixes.

    Raises:
        CheckpointError: if there is none.
    """
    state = checkpoint.get("state_dict", checkpoint)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            "This file holds no state dict of the reference implementation: expected tensors "
            "under the key 'state_dict' or at the top level."
        )
    return state


def _shorten(keys: list[str], limit: int = 8) -> str:
    shown = ", ".join(keys[:limit])
    return shown if len(keys) <= limit else f"{shown} and {len(keys) - limit} more"


def _head_names(model: CoDETR) -> list[str]:
    return [] if model.auxiliary is None else list(model.auxiliary.heads)


def _reorder_anchors(width: int) -> Callable[[Tensor], Tensor]:
    """Reorders RPN output channels: the reference loops its three ratios outside the sizes,
    Detectron2 inside. ``width`` is the number of channels per anchor."""

    def rewrite(value: Tensor) -> Tensor:
        grouped = value.unflatten(0, (3, -1, width))
        return grouped.transpose(0, 1).flatten(0, 2).contiguous()

    return rewrite


def _table(model: CoDETR) -> list[Row]:
    layers = model.decoder.num_layers
    head, transformer = "query_head", "query_head.transformer"
    rows = [
        *_resnet_rows(),
        Row("neck.convs.{i}.conv.{rest}", "backbone.lateral_convs.{i}.{rest}"),
        Row("neck.convs.{i}.gn.{rest}", "backbone.lateral_convs.{i}.norm.{rest}"),
        Row("neck.extra_convs.{i}.conv.{rest}", "backbone.extra_convs.{i}.{rest}"),
        Row("neck.extra_convs.{i}.gn.{rest}", "backbone.extra_convs.{i}.norm.{rest}"),
        Row(f"{transformer}.level_embeds", "encoder.level_embed"),
        *_layer_rows(f"{transformer}.encoder", "encoder", ["attention"], ["attention", "ffn"]),
        *_layer_rows(
            f"{transformer}.decoder",
            "decoder",
            ["self_attention", "cross_attention"],
            ["self_attention", "cross_attention", "ffn"],
        ),
        Row(f"{transformer}.enc_output.{{rest}}", "queries.0.memory_proj.{rest}"),
        Row(f"{transformer}.enc_output_norm.{{rest}}", "queries.0.memory_norm.{rest}"),
        Row(f"{transformer}.pos_trans.{{rest}}", "queries.0.position_proj.{rest}"),
        Row(f"{transformer}.pos_trans_norm.{{rest}}", "queries.0.position_norm.{rest}"),
        Row(f"{head}.query_embedding.weight", "queries.0.content.weight"),
        Row(f"{head}.cls_branches.{layers}.{{rest}}", "queries.0.class_head.{rest}"),
        Row(f"{head}.cls_branches.{{i}}.{{rest}}", "decoder.class_heads.{i}.{rest}"),
    ]
    for official, ours in ((0, 0), (2, 1), (4, 2)):  # the activations between have no weights
        last = f"{head}.reg_branches.{layers}.{official}.{{rest}}"
        rows.append(Row(last, f"queries.0.box_head.layers.{ours}.{{rest}}"))
        each = f"{head}.reg_branches.{{i}}.{official}.{{rest}}"
        rows.append(Row(each, f"decoder.box_heads.{{i}}.layers.{ours}.{{rest}}"))
    return [*rows, *(_stripped_rows() if model.auxiliary is None else _auxiliary_rows(model))]


def _resnet_rows() -> Iterable[Row]:
    ours = "backbone.bottom_up"
    yield Row("backbone.conv1.weight", f"{ours}.stem.conv1.weight")
    # Our batch norm is frozen and counts no batches.
    for norm in ("bn1", "layer{i}.{j}.bn1", "layer{i}.{j}.bn2", "layer{i}.{j}.bn3"):
        yield Row(f"backbone.{norm}.num_batches_tracked", None)
    yield Row("backbone.layer{i}.{j}.downsample.1.num_batches_tracked", None)
    yield Row("backbone.bn1.{rest}", f"{ours}.stem.conv1.norm.{{rest}}")
    for stage in (1, 2, 3, 4):
        theirs, here = f"backbone.layer{stage}.{{i}}", f"{ours}.res{stage + 1}.{{i}}"
        yield Row(f"{theirs}.conv{{j}}.weight", f"{here}.conv{{j}}.weight")
        yield Row(f"{theirs}.bn{{j}}.{{rest}}", f"{here}.conv{{j}}.norm.{{rest}}")
        yield Row(f"{theirs}.downsample.0.weight", f"{here}.shortcut.weight")
        yield Row(f"{theirs}.downsample.1.{{rest}}", f"{here}.shortcut.norm.{{rest}}")


def _layer_rows(official: str, ours: str, attentions: list[str], norms: list[str]) -> Iterable[Row]:
    theirs, here = f"{official}.layers.{{i}}", f"{ours}.layers.{{i}}"
    for number, name in enumerate(attentions):
        # mmcv wraps nn.MultiheadAttention one level deeper
        inner = "attn.{rest}" if name == "self_attention" else "{rest}"
        yield Row(f"{theirs}.attentions.{number}.{inner}", f"{here}.{name}.{{rest}}")
    yield Row(f"{theirs}.ffns.0.layers.0.0.{{rest}}", f"{here}.ffn.linear1.{{rest}}")
    yield Row(f"{theirs}.ffns.0.layers.1.{{rest}}", f"{here}.ffn.linear2.{{rest}}")
    for number, name in enumerate(norms):
        yield Row(f"{theirs}.norms.{number}.{{rest}}", f"{here}.{name}_norm.{{rest}}")


def _auxiliary_rows(model: CoDETR) -> Iterable[Row]:
    transformer = "query_head.transformer"
    yield Row("query_head.downsample.0.{rest}", "auxiliary.pyramid.conv.{rest}")
    yield Row("query_head.downsample.1.{rest}", "auxiliary.pyramid.conv.norm.{rest}")
    names = _head_names(model)
    yield Row(
        f"{transformer}.head_pos_embed.weight", "auxiliary.positive_queries.{head}.head_embedding"
    )
    for number, name in enumerate(names):
        ours = f"auxiliary.positive_queries.{name}"
        for theirs, here in (
            ("aux_pos_trans", "position_proj"),
            ("aux_pos_trans_norm", "position_norm"),
            ("pos_feats_trans", "feature_proj"),
            ("pos_feats_norm", "feature_norm"),
        ):
            yield Row(f"{transformer}.{theirs}.{number}.{{rest}}", f"{ours}.{here}.{{rest}}")
    if "roi" in names:
        rpn, roi = "auxiliary.heads.roi.rpn.rpn_head", "auxiliary.heads.roi.roi_heads"
        yield Row("rpn_head.rpn_conv.{rest}", f"{rpn}.conv.{{rest}}")
        yield Row(
            "rpn_head.rpn_cls.{rest}", f"{rpn}.objectness_logits.{{rest}}", _reorder_anchors(1)
        )
        yield Row("rpn_head.rpn_reg.{rest}", f"{rpn}.anchor_deltas.{{rest}}", _reorder_anchors(4))
        theirs = "roi_head.0.bbox_head"
        yield Row(f"{theirs}.shared_fcs.0.{{rest}}", f"{roi}.box_head.fc1.{{rest}}")
        yield Row(f"{theirs}.shared_fcs.1.{{rest}}", f"{roi}.box_head.fc2.{{rest}}")
        yield Row(f"{theirs}.fc_cls.{{rest}}", f"{roi}.box_predictor.cls_score.{{rest}}")
        yield Row(f"{theirs}.fc_reg.{{rest}}", f"{roi}.box_predictor.bbox_pred.{{rest}}")
    if "atss" in names:
        atss = "auxiliary.heads.atss"
        for theirs, here in (("cls_convs", "class_tower"), ("reg_convs", "box_tower")):
            yield Row(f"bbox_head.0.{theirs}.{{i}}.conv.{{rest}}", f"{atss}.{here}.{{i}}.{{rest}}")
            yield Row(
                f"bbox_head.0.{theirs}.{{i}}.gn.{{rest}}", f"{atss}.{here}.{{i}}.norm.{{rest}}"
            )
        yield Row("bbox_head.0.atss_cls.{rest}", f"{atss}.class_logits.{{rest}}")
        yield Row("bbox_head.0.atss_reg.{rest}", f"{atss}.box_deltas.{{rest}}")
        yield Row("bbox_head.0.atss_centerness.{rest}", f"{atss}.centreness.{{rest}}")
        yield Row("bbox_head.0.scales.{i}.scale", f"{atss}.scales.{{i}}")


def _stripped_rows() -> Iterable[Row]:
    """What a model without auxiliary heads has no place for."""
    for prefix in ("query_head.downsample", "rpn_head", "roi_head", "bbox_head"):
        yield Row(f"{prefix}.{{rest}}", None)
    for name in (
        "head_pos_embed",
        "aux_pos_trans",
        "aux_pos_trans_norm",
        "pos_feats_trans",
        "pos_feats_norm",
    ):
        yield Row(f"query_head.transformer.{name}.{{rest}}", None)
