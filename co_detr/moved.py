"""Names that parts, settings, tensors and losses had in earlier versions.

A finished training keeps a `config.yaml` with the dotted names of what its run was built from, and
its checkpoints and logs have names of tensors and losses. When one of these changes, the old name
goes into a table here, and stays for at least one release.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from co_detr.errors import ConfigError

logger = logging.getLogger(__name__)

# Old dotted name of a module, class or function -> the new one. What lies below moves with it.
MOVED: dict[str, str] = {
    **{
        f"co_detr.data.loader.{name}": f"co_detr.data.augmentation.{name}"
        for name in (
            *("detr_train_augmentation", "detr_test_augmentation", "lsj_train_augmentation"),
            *("ChannelResize", "ResizeScale", "ResizeShortestEdge"),
        )
    },
    "co_detr.data.lvis": "co_detr.data.coco",
    "co_detr.data.mapper": "co_detr.data.loader",
    "co_detr.data.objects365": "co_detr.data.coco",
    "co_detr.data.variation": "co_detr.data.augmentation",
    "co_detr.engine.evaluation.CocoBoxEvaluator": (
        "co_detr.engine.evaluators.CocoDetectionEvaluator"
    ),
    "co_detr.engine.evaluators.CocoBoxEvaluator": (
        "co_detr.engine.evaluators.CocoDetectionEvaluator"
    ),
    "co_detr.engine.evaluators.LvisBoxEvaluator": (
        "co_detr.engine.evaluators.LvisDetectionEvaluator"
    ),
    "co_detr.engine.lvis_evaluation": "co_detr.engine.evaluators",
    "co_detr.modeling.auxiliary.CentreSamplingAssigner": (
        "co_detr.modeling.auxiliary.CenterSamplingAssigner"
    ),
    "co_detr.modeling.auxiliary.CentrenessCriterion": (
        "co_detr.modeling.auxiliary.CenternessCriterion"
    ),
    "co_detr.modeling.auxiliary.assigners.CentreSamplingAssigner": (
        "co_detr.modeling.auxiliary.assigners.CenterSamplingAssigner"
    ),
    "co_detr.modeling.auxiliary.assigners.atss": "co_detr.modeling.auxiliary.assigners",
    "co_detr.modeling.auxiliary.assigners.centre_sampling": "co_detr.modeling.auxiliary.assigners",
    "co_detr.modeling.auxiliary.assigners.max_iou": "co_detr.modeling.auxiliary.assigners",
    "co_detr.modeling.auxiliary.assigners.paa": "co_detr.modeling.auxiliary.assigners",
    "co_detr.modeling.auxiliary.atss": "co_detr.modeling.auxiliary.dense_networks",
    "co_detr.modeling.auxiliary.box_codes": "co_detr.modeling.auxiliary.dense_losses",
    "co_detr.modeling.auxiliary.dense_criteria": "co_detr.modeling.auxiliary.dense_losses",
    "co_detr.modeling.auxiliary.dense_losses.CentrenessCriterion": (
        "co_detr.modeling.auxiliary.dense_losses.CenternessCriterion"
    ),
    "co_detr.modeling.auxiliary.fcos": "co_detr.modeling.auxiliary.dense_networks",
    "co_detr.modeling.auxiliary.hybrid": "co_detr.modeling.auxiliary.branch",
    "co_detr.modeling.auxiliary.paa": "co_detr.modeling.auxiliary.dense_networks",
    "co_detr.modeling.auxiliary.pyramid": "co_detr.modeling.auxiliary.branch",
    "co_detr.modeling.auxiliary.retinanet": "co_detr.modeling.auxiliary.dense_networks",
    "co_detr.modeling.auxiliary.simple_pyramid": "co_detr.modeling.auxiliary.branch",
    "co_detr.modeling.auxiliary.towers": "co_detr.modeling.auxiliary.dense_networks",
    "co_detr.modeling.backbones.feature_pyramid": "co_detr.modeling.backbones.vit",
    "co_detr.modeling.backbones.layer_decay": "co_detr.modeling.backbones.vit",
    "co_detr.modeling.criterion": "co_detr.modeling.losses",
    "co_detr.modeling.decoder": "co_detr.modeling.transformer",
    "co_detr.modeling.encoder": "co_detr.modeling.transformer",
    "co_detr.modeling.matching": "co_detr.modeling.losses",
    "co_detr.modeling.neck": "co_detr.modeling.backbones.resnet",
    "co_detr.modeling.padding": "co_detr.modeling.geometry",
    "co_detr.modeling.position": "co_detr.modeling.geometry",
    "co_detr.modeling.queries.anchors": "co_detr.modeling.queries.sources",
    "co_detr.modeling.queries.hybrid_matching": "co_detr.modeling.queries.sources",
    "co_detr.modeling.queries.learned": "co_detr.modeling.queries.sources",
    "co_detr.modeling.queries.two_stage": "co_detr.modeling.queries.sources",
    "co_detr.modeling.resnet": "co_detr.modeling.backbones.resnet",
    "co_detr.modeling.single_scale.decoder": "co_detr.modeling.single_scale",
    "co_detr.modeling.single_scale.encoder": "co_detr.modeling.single_scale",
}

_BACKBONES = "co_detr.modeling.backbones.vit"

# Old key of a config -> the last part that it has now.
RENAMED_KEYS = {"model.decoder.normalise_output": "normalize_output"}
# Keys that are ignored, as what they said is now seen from other keys or from the data.
DROPPED_KEYS = ("dataloader.train.mapper.use_instance_mask",)
# Old name of a module of an auxiliary head -> the new one: part of the names of its tensors.
RENAMED_MODULES = {"centreness": "centerness"}
# Old name of a loss -> the new one, in the logs of a run.
RENAMED_LOSSES = {"loss_centreness": "loss_centerness"}


def present_key(key: str) -> str:
    """What a key of a config of an earlier version is called now; any other key as it is."""
    if key not in RENAMED_KEYS:
        return key
    return ".".join([*key.split(".")[:-1], RENAMED_KEYS[key]])


def rename_keys(config: MutableMapping[str, Any]) -> dict[str, str]:
    """Gives the keys of a config, in place, the names that they have now; drops `DROPPED_KEYS`.

    Where a config has both names, as one in Python that changes another one, the value of the old
    name counts: whoever set it knew no other.

    Returns:
        Those that were found, old -> new.
    """
    renamed = {}
    for old in (*RENAMED_KEYS, *DROPPED_KEYS):
        *parents, last = old.split(".")
        node: Any = config
        for part in parents:
            node = node.get(part) if isinstance(node, MutableMapping) else None
        if not isinstance(node, MutableMapping) or last not in node:
            continue
        value = node.pop(last)
        if old in RENAMED_KEYS:
            node[RENAMED_KEYS[old]] = value
            renamed[old] = present_key(old)
    return renamed


def present_loss(name: str) -> str:
    """What a logged loss of an earlier version, such as "atss.loss_centreness", is called now."""
    *parts, last = name.split(".")
    return ".".join([*parts, RENAMED_LOSSES.get(last, last)])


def named_sources(sources: Sequence[Any]) -> dict[str, Any] | None:
    """The list of query sources in a config of version 0.1 as the group by names that it is now.

    A source had a name of its own, or that of its kind.

    Raises:
        ConfigError: if one is no query source, or two have one name.
    """
    names = [_name_of(source) for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError(f"model.queries has two sources of one name ({', '.join(names)}).")
    named: dict[str, Any] = {}
    for name, source in zip(names, sources, strict=True):
        named[name] = {key: value for key, value in source.items() if key != "name"}
        # As ${..0.name}, a source referred to the name of another.
        if reference := re.fullmatch(r"\$\{\.\.(\d+)\.name\}", str(source.get("sees"))):
            place = int(reference[1])
            if place >= len(names):
                raise ConfigError(
                    f"model.queries: {name} sees number {place} of {len(names)} sources (from 0)."
                )
            named[name]["sees"] = names[place]
    return {**named, "_target_": "co_detr.modeling.queries.QuerySources"} if named else None


def present_part(node: Mapping[str, Any]) -> dict[str, Any]:
    """A described part of a config, with the name and the arguments that it has now.

    The learning rates of ViT's layers had a class of their own.
    """
    present = dict(node)
    if isinstance(node.get("_target_"), str):
        present["_target_"] = present_name(node["_target_"])
        if present["_target_"] == f"{_BACKBONES}.LayerDecay":
            return {
                "factor": 1.0,
                "layer_decay": node["decay_rate"],
                "depths": node["num_layers"],
                "_target_": "co_detr.engine.optim.LearningRateFactor",
            }
    return present


def _name_of(source: Any) -> str:
    target = source.get("_target_") if isinstance(source, Mapping) else None
    kind = target if isinstance(target, str) else getattr(target, "__name__", None)
    if kind is None:
        raise ConfigError(
            f"model.queries has {source!r}, which is no query source: give it a _target_."
        )
    default = "denoising" if kind.endswith("DenoisingQueries") else "matching"
    return str(source.get("name", default))


def present_name(name: str) -> str:
    """What a dotted name of an earlier version is called now; any other name as it is.

    A part may have moved first and been renamed later.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:length])) in MOVED:
            return present_name(".".join([MOVED[prefix], *parts[length:]]))
    return name


def renamed_member(module: str, members: MutableMapping[str, Any], name: str) -> Any:
    """A part that a module had under another name, with one warning.

    For the ``__getattr__`` of a module whose parts configs in Python import.

    Args:
        module: its dotted name.
        members: its ``globals()``, which have the old name, too, afterwards.
        name: that is not among them.

    Raises:
        AttributeError: if nothing was ever called so.
    """
    present = present_name(f"{module}.{name}").rpartition(".")[2]
    if present == name:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    logger.warning("%s is called %s now: import that one.", name, present)
    members[name] = members[present]  # one import asks twice, and is to warn once
    return members[name]
