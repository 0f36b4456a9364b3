"""Configs: LazyConfig files and YAML, with overrides that must name something that exists, checked.

`co_detr.engine.config_yaml` is how a run's config.yaml is written and read.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig
from detectron2.utils.registry import _convert_target_to_string
from omegaconf import DictConfig, ListConfig, OmegaConf

from co_detr.engine.config_yaml import read_yaml_config, tell_renamed
from co_detr.engine.overrides import apply_overrides
from co_detr.errors import ConfigError, require_whole
from co_detr.modeling.backbones.timm import pixel_mean
from co_detr.moved import named_sources, rename_keys

logger = logging.getLogger(__name__)

_PATHS = ("train", "train_images", "val", "val_images")
PARTS = ("common", "models")  # folders of what configs are made of
NODES = ("model", "optimizer", "lr_multiplier", "dataloader", "train", "data")


def load_config(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Loads an experiment and applies `key=value` overrides (see `apply_overrides`).

    A `.py` file is run. A `.yaml` file is read with restrictions (see `read_yaml_config`), but
    names what is called to build a run: use configs of people you trust only.

    Args:
        path: of a file, or the name of a model of the zoo, as ``co_detr_r50``.

    Returns:
        The nodes of `NODES`; other names that the file defines are dropped.

    Raises:
        ConfigError: if the file is missing or incomplete, or an override names no key.
    """
    path = _present_path(path)
    if path.endswith((".yaml", ".yml")):
        cfg = read_yaml_config(path)
    elif path.endswith(".py"):
        cfg = LazyConfig.load(path)
        tell_renamed(rename_keys(cfg), path)
    else:
        raise ConfigError(f"config file {path} is neither .py nor .yaml: name one that is.")
    missing = [node for node in NODES if node not in cfg]
    if missing:
        raise ConfigError(f"config file {path} does not define {', '.join(missing)}: add it.")
    # Parts that the file imported to build its nodes from: an override of those does nothing.
    for part in set(cfg) - set(NODES):
        del cfg[part]
    if isinstance(cfg.model.get("queries"), ListConfig):
        sources = OmegaConf.to_container(cfg.model.queries, resolve=False)
        cfg.model.queries = named_sources(sources)
    cfg.dataloader.setdefault("tta", None)  # files of earlier versions do not know it
    _reopen_masks(cfg)
    apply_overrides(cfg, overrides)
    _settle_masks(cfg)
    _check_texts(cfg)
    _check_train_node(cfg.train)
    _check_batch(cfg)
    _check_loaders(cfg)
    _check_channels(cfg)
    return cfg


def _reopen_masks(cfg: DictConfig) -> None:
    """Leaves open again what `_settle_masks` has fixed in the saved config of a run without masks.

    An override that adds a mask head, or pastes objects, then has an effect; one that fixes it has
    the last word.
    """
    train = cfg.dataloader.train
    if learns_masks(cfg.model):
        return
    if train.get("copy_paste") is None and train.dataset.get("with_masks") is False:
        train.dataset.with_masks = None
    for part in (train.get("copy_paste"), train.get("mixing")):
        if part is not None and part.get("keep_masks") is False:
            part.keep_masks = None


def _settle_masks(cfg: DictConfig) -> None:
    """Where a config leaves it open (null), masks are read if something learns or moves them."""
    train = cfg.dataloader.train
    learns, pasting = learns_masks(cfg.model), train.get("copy_paste")
    mixing = train.get("mixing")
    if mixing is not None and mixing.get("keep_masks", False) is None:
        mixing.keep_masks = learns
    if train.dataset.get("with_masks", False) is None:
        train.dataset.with_masks = learns or pasting is not None
    if pasting is not None and pasting.get("keep_masks", False) is None:
        pasting.keep_masks = learns


def learns_masks(model: Any) -> bool:
    """Whether a part of a model's config, such as the model or an auxiliary head, has a mask head.

    That is a node `mask_head`, wherever it stands, which is not null.
    """
    if not isinstance(model, DictConfig):
        return False
    # As plain values, which are walked in a third of the time of OmegaConf's nodes.
    return _has_mask_head(OmegaConf.to_container(model, resolve=True))


def _has_mask_head(node: Any) -> bool:
    if not isinstance(node, dict):
        return False
    return node.get("mask_head") is not None or any(map(_has_mask_head, node.values()))


def predicts_masks(model: DictConfig) -> bool:
    """Whether the detections of a model have masks; as ``CoDETR.predicts_masks``, of its config."""
    if model.get("mask_head") is not None:
        return True
    detector = model.get("evaluate_with")
    return detector is not None and learns_masks(OmegaConf.select(model, f"auxiliary.{detector}"))


def config_files(folder: Path) -> dict[str, Path]:
    """The configs of a run in a folder such as ``configs`` by name, whatever family's folder they
    are in; no two have the same. Those of `PARTS` are what configs are made of.
    """
    paths = [*folder.glob("*.py"), *folder.glob("*/*.py")]
    return {
        path.stem: path
        for path in sorted(paths, key=lambda path: path.stem)
        if path.parent.name not in PARTS
    }


def _present_path(path: str) -> str:
    """A path to a file that exists.

    A name without a folder is one of the model zoo. In version 0.1, all configs stood in one
    folder: the path that one had there still leads to it, with a warning.

    Raises:
        ConfigError: if there is no such file.
    """
    if os.path.isfile(path):
        return path
    if not os.path.dirname(path) and not os.path.splitext(path)[1]:
        from co_detr.model_zoo import config_file  # which loads configs from here

        return str(config_file(path))
    folder, name = os.path.split(path)
    found = None
    if all(os.path.isdir(os.path.join(folder, parts)) for parts in PARTS):
        found = config_files(Path(folder)).get(name.removesuffix(".py"))
    if found is None:
        raise ConfigError(
            f"config file {path!r} does not exist: pass --config-file configs/FAMILY/NAME.py."
        )
    logger.warning("%s is %s now: name that one.", path, found)
    return str(found)


def _check_texts(cfg: DictConfig) -> None:
    for key in ("train.output_dir", "train.device", *(f"data.{name}" for name in _PATHS)):
        value = OmegaConf.select(cfg, key, default="")
        if not isinstance(value, str):
            raise ConfigError(f"{key}={value} must be a text: write it in quotation marks.")


def _check_train_node(train: DictConfig) -> None:
    for key, least in (("max_iter", 1), ("log_period", 1), ("seed", 0), ("eval_period", 0)):
        require_whole(f"train.{key}", train[key], least)
    limit = train.clip_grad.max_norm
    if limit is not None and not limit > 0:
        raise ConfigError(
            f"train.clip_grad.max_norm={limit} must be above 0, or null for no limit."
        )
    if not train.output_dir:
        raise ConfigError("train.output_dir is empty: name the folder that the run writes to.")
    try:
        torch.device(train.device)
    except RuntimeError as error:
        raise ConfigError(
            f"train.device={train.device} is no device: set it to cuda or cpu."
        ) from error
    if train.amp.dtype not in ("bfloat16", "float16"):
        raise ConfigError(f'train.amp.dtype={train.amp.dtype} must be "bfloat16" or "float16".')


# What works on red, green and blue, and is off where it is 0 or null.
_FOR_COLORS = (
    "dataloader.tta",
    "dataloader.train.copy_paste",
    *(f"dataloader.train.mixing.{name}" for name in ("mosaic", "mixup")),
    *(
        f"dataloader.train.mapper.variation.{name}"
        for name in ("brightness", "contrast", "saturation", "hue", "blur")
    ),
)


def _check_loaders(cfg: DictConfig) -> None:
    for key in ("dataloader.train.num_workers", "dataloader.test.num_workers"):
        require_whole(key, OmegaConf.select(cfg, key, default=0), least=0)
    order = cfg.data.get("image_format", "RGB")
    if order not in ("RGB", "BGR"):
        raise ConfigError(f'data.image_format={order} must be "RGB" or "BGR".')


def _check_channels(cfg: DictConfig) -> None:
    """The backbone takes what is read, and nothing in between is for three channels alone."""
    wanted = channels_of(cfg.model)
    channels = cfg.data.get("channels", 3)
    if channels != wanted:
        raise ConfigError(
            f"data.channels={channels}, but the backbone takes {wanted}: set both to the same "
            "number (model.backbone.bottom_up.in_channels, which backbones of timm have)."
        )
    for key in _FOR_COLORS:
        if channels != 3 and OmegaConf.select(cfg, key, default=None):
            raise ConfigError(
                f"{key} is for images of 3 channels, not of {channels}: set it to its default."
            )
    if wanted == 3 and _is_of_timm(cfg.model) and cfg.data.get("image_format", "RGB") != "RGB":
        raise ConfigError(
            f"data.image_format={cfg.data.image_format}, but weights and normalization of timm are "
            "for RGB: set data.image_format=RGB."
        )


def channels_of(model: DictConfig) -> int:
    """Channels of the images that a model's config is for."""
    return OmegaConf.select(model, "backbone.bottom_up.in_channels", default=3)


def _is_of_timm(model: DictConfig) -> bool:
    normalization = model.get("pixel_mean")
    if not isinstance(normalization, DictConfig):
        return False
    # A name in a config.yaml.
    return normalization.get("_target_") in (pixel_mean, _convert_target_to_string(pixel_mean))


def _check_batch(cfg: DictConfig) -> None:
    """The batch is set in one place: what the loader is told has to follow from it."""
    loader = cfg.dataloader.train
    for name, key in (
        ("effective_batch_size", "total_batch_size"),
        ("images_per_gpu", "images_per_gpu"),
    ):
        if name not in cfg.train:  # a config.yaml of an earlier version, for predictions
            continue
        value = cfg.train[name]
        whole_share = "for all of a process's" if name == "images_per_gpu" else None
        require_whole(f"train.{name}", value, or_null=whole_share)
        if loader.get(key) != value:
            raise ConfigError(
                f"dataloader.train.{key}={loader.get(key)} is not train.{name}={value}: set "
                f"train.{name}={loader.get(key)} instead, which the loader follows."
            )


def suggest_rate(cfg: DictConfig, path: str, overrides: Sequence[str]) -> None:
    """Warns where the command line changes the batch of a recipe and keeps its learning rate.

    Adam divides a gradient by its own size, so that the rate has to follow the noise of the batch,
    which is its square root (Malladi et al., NeurIPS 2022); docs/machine.md has a measurement.

    Args:
        cfg: what the config file and the overrides make.
        path: of the config file.
    """
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    if "train.effective_batch_size" not in given or "optimizer.lr" in given:
        return
    batch, recipe = cfg.train.effective_batch_size, load_config(path)
    usual, rate = recipe.train.effective_batch_size, recipe.optimizer.get("lr")
    # The rule is Adam's; other optimizers have others, or no rate.
    if batch != usual and rate and "adam" in str(recipe.optimizer.get("_target_")).lower():
        logger.warning(
            "optimizer.lr=%g belongs to %d images per step, not to train.effective_batch_size=%d: "
            "optimizer.lr=%.2g is a good first choice (docs/machine.md has why).",
            *(rate, usual, batch, rate * math.sqrt(batch / usual)),
        )
