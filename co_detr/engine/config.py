"""Loading LazyConfig files and applying overrides that must name something that exists."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any
from unittest import mock

import yaml
from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from co_detr.errors import ConfigError

NODES = ("model", "optimizer", "lr_multiplier", "dataloader", "train", "data")


def load_config(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Loads an experiment and applies `key=value` overrides.

    An override may set a key of the config, or an argument that the config leaves at the default
    of the function or class that it describes. LazyConfig itself would add any key silently.

    Returns:
        The nodes of `NODES`; other names that the file defines are dropped.

    Raises:
        ConfigError: if the file is missing or incomplete, or an override names no key.
    """
    if not os.path.isfile(path):
        raise ConfigError(
            f"config file {path!r} does not exist: pass --config-file configs/NAME.py."
        )
    cfg = LazyConfig.load(path)
    missing = [node for node in NODES if node not in cfg]
    if missing:
        raise ConfigError(f"config file {path} does not define {', '.join(missing)}: add it.")
    # Parts that the file imported to build its nodes from: an override of those does nothing.
    for part in set(cfg) - set(NODES):
        del cfg[part]
    apply_overrides(cfg, overrides)
    _check_train_node(cfg.train)
    _check_batch(cfg)
    return cfg


def save_config(cfg: DictConfig, path: str) -> None:
    """Writes a complete config as YAML that `load_config` reads.

    Detectron2 alone would sort keys, but the order of auxiliary heads is that of the model's
    parameters, which a saved optimiser knows by their numbers.
    """
    in_order = functools.partial(yaml.dump, sort_keys=False)
    with mock.patch.object(yaml, "dump", in_order):
        LazyConfig.save(cfg, path)


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Applies `key=value` overrides in place; see `load_config`."""
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException as error:
            raise ConfigError(
                f"override {override!r} is not of the form key=value; quote a value that contains "
                "spaces, commas or brackets, as in 'key=\"a, b\"'."
            ) from error
        key = parsed.key_or_group
        if "=" not in override or parsed.is_delete() or parsed.is_add():
            raise ConfigError(f"override {override!r} is not of the form key=value.")
        _check_key(cfg, key)
        value = _checked_value(key, OmegaConf.select(cfg, key), parsed.value())
        try:
            OmegaConf.update(cfg, key, value, merge=True, force_add=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"override {override!r} cannot be applied: {error}") from error


def _check_key(cfg: DictConfig, key: str) -> None:
    *parents, last = key.split(".")
    node: Any = cfg
    for depth, part in enumerate(parents):
        if part not in _children(node):
            raise _unknown_key(key, parents[:depth], part, _children(node))
        node = node[int(part)] if isinstance(node, ListConfig) else node[part]
    known = _children(node) | _arguments_of_target(node)
    if last not in known:
        raise _unknown_key(key, parents, last, known)


def _unknown_key(key: str, parents: list[str], part: str, known: set[str]) -> ConfigError:
    where = f"{'.'.join(parents)} has" if parents else "the config has"
    near = difflib.get_close_matches(part, known, n=1)
    if near:
        mend = f"did you mean {'.'.join([*parents, near[0]])}?"
    else:
        mend = f"{where} {', '.join(sorted(known)) or 'no keys'}."
    return ConfigError(f"override {key} names no key of the config: {mend}")


def _children(node: Any) -> set[str]:
    if isinstance(node, ListConfig):
        return {str(i) for i in range(len(node))}
    if isinstance(node, DictConfig):
        return {str(key) for key in node}
    return set()


def _arguments_of_target(node: Any) -> set[str]:
    """Named arguments of the callable that a LazyCall node describes."""
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if target is None:
        return set()
    if isinstance(target, str):
        target = locate(target)
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return set()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name for parameter in parameters if parameter.kind in named}


def _checked_value(key: str, old: Any, new: Any) -> Any:
    """Refuses text where a number was, and reads 1e3 as an integer where an integer was."""
    if isinstance(old, bool) or not isinstance(old, (int, float)) or new is None:
        if isinstance(old, bool) and not isinstance(new, bool):
            raise ConfigError(f"override {key}={new} must be true or false.")
        return new
    if is_dataclass(new) or isinstance(new, (bool, str)):
        # An interpolation such as ${train.seed} is text that becomes a number.
        if isinstance(new, str) and new.startswith("${"):
            return new
        raise ConfigError(f"override {key}={new} must be a number, as {old} is.")
    if isinstance(old, int) and isinstance(new, float) and new.is_integer():
        return int(new)
    return new


def _check_train_node(train: DictConfig) -> None:
    for key in ("max_iter", "log_period"):
        if not (isinstance(train[key], int) and train[key] >= 1):
            raise ConfigError(f"train.{key}={train[key]} must be a whole number of at least 1.")
    if not (isinstance(train.seed, int) and train.seed >= 0):
        raise ConfigError(f"train.seed={train.seed} must be a whole number of at least 0.")
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
