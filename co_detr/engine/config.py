"""Loading LazyConfig files and applying overrides that must name something that exists."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf

from co_detr.engine.config_yaml import config_text, read_yaml_config
from co_detr.engine.overrides import apply_overrides
from co_detr.errors import ConfigError
from co_detr.files import written_whole

_PATHS = ("train", "train_images", "val", "val_images")
NODES = ("model", "optimizer", "lr_multiplier", "dataloader", "train", "data")


def load_config(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Loads an experiment and applies `key=value` overrides (see `apply_overrides`).

    A `.py` file is run. A `.yaml` file is read with restrictions (see `read_yaml_config`), but
    names what is called to build a run: use configs of people you trust only.

    Returns:
        The nodes of `NODES`; other names that the file defines are dropped.

    Raises:
        ConfigError: if the file is missing or incomplete, or an override names no key.
    """
    if not os.path.isfile(path):
        raise ConfigError(
            f"config file {path!r} does not exist: pass --config-file configs/NAME.py."
        )
    if path.endswith((".yaml", ".yml")):
        cfg = read_yaml_config(path)
    elif path.endswith(".py"):
        cfg = LazyConfig.load(path)
    else:
        raise ConfigError(f"config file {path} is neither .py nor .yaml: name one that is.")
    missing = [node for node in NODES if node not in cfg]
    if missing:
        raise ConfigError(f"config file {path} does not define {', '.join(missing)}: add it.")
    # Parts that the file imported to build its nodes from: an override of those does nothing.
    for part in set(cfg) - set(NODES):
        del cfg[part]
    apply_overrides(cfg, overrides)
    _check_texts(cfg)
    _check_train_node(cfg.train)
    _check_batch(cfg)
    return cfg


def save_config(cfg: DictConfig, path: str) -> None:
    """Writes a complete config as YAML that `load_config` reads."""
    with written_whole(path) as file:
        file.write(config_text(cfg))


def _check_texts(cfg: DictConfig) -> None:
    for key in ("train.output_dir", "train.device", *(f"data.{name}" for name in _PATHS)):
        value = OmegaConf.select(cfg, key, default="")
        if not isinstance(value, str):
            raise ConfigError(f"{key}={value} must be a text: write it in quotation marks.")


def _check_train_node(train: DictConfig) -> None:
    for key in ("max_iter", "log_period"):
        if not (isinstance(train[key], int) and train[key] >= 1):
            raise ConfigError(f"train.{key}={train[key]} must be a whole number of at least 1.")
    if not (isinstance(train.seed, int) and train.seed >= 0):
        raise ConfigError(f"train.seed={train.seed} must be a whole number of at least 0.")
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
        optional = name == "images_per_gpu"
        if not (optional and value is None) and not (isinstance(value, int) and value >= 1):
            raise ConfigError(f"train.{name}={value} must be a whole number of at least 1.")
        if loader.get(key) != value:
            raise ConfigError(
                f"dataloader.train.{key}={loader.get(key)} is not train.{name}={value}: set "
                f"train.{name}={loader.get(key)} instead, which the loader follows."
            )
