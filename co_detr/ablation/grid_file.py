"""Reads a grid from YAML; docs/ablation.md describes the file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from co_detr.ablation.grid import Grid, Variant, check_seeds
from co_detr.errors import ConfigError, first_line

_GRID_KEYS = ("config", "overrides", "seeds", "variants")
_VARIANT_KEYS = ("name", "config", "overrides", "seeds")


def read_grid_file(path: str, overrides: Sequence[str] = ()) -> Grid:
    """Reads a grid.

    Overrides are applied in this order, so that a later one wins: those of the file for all
    variants, `overrides`, those of the variant. What makes a variant is thereby never undone.

    Args:
        path: the YAML file. Configs in it are relative to the current directory.
        overrides: of the command line, for all variants.

    Raises:
        ConfigError: if the file cannot be read, or anything in it is unknown, of a wrong type,
            missing or there twice.
    """
    content = _load(path)
    _check_keys(content, _GRID_KEYS, path)
    common = (*_texts(content, "overrides", path), *overrides)
    default_config = _text(content, "config", path)
    default_seeds = content.get("seeds", [0])
    _check_list(default_seeds, f"seeds in {path}")
    check_seeds(default_seeds, path)
    entries = content.get("variants", [])
    _check_list(entries, f"variants in {path}")
    variants = []
    for number, entry in enumerate(entries, start=1):
        where = f"variant {number} of {path}"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where} is {entry!r}: write it as `- name: ...`.")
        _check_keys(entry, _VARIANT_KEYS, where)
        name, config = _text(entry, "name", where), _text(entry, "config", where)
        if name is None:
            raise ConfigError(f"{where} has no name: add one.")
        if config is None and default_config is None:
            raise ConfigError(f"{where} ({name!r}) has no config, nor has the file: add one.")
        seeds = entry.get("seeds", default_seeds)
        _check_list(seeds, f"seeds of {where}")
        own = _texts(entry, "overrides", where)
        variants.append(Variant(name, config or default_config, (*common, *own), tuple(seeds)))
    return Grid(tuple(variants))


def _load(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise ConfigError(f"grid file {path!r} does not exist: pass --grid configs/ablation/NAME.")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"grid file {path} is no YAML ({first_line(error)}): mend it.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"grid file {path} has no keys: it needs `variants`.")
    return content


def _check_keys(node: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key in node:
        if key not in known:
            raise ConfigError(f"{where} has the unknown key {key!r}: use {', '.join(known)}.")


def _check_list(value: Any, what: str) -> None:
    if not isinstance(value, list):
        raise ConfigError(f"{what}: {value!r} is no list; write it as [a, b].")


def _text(node: dict[str, Any], key: str, where: str) -> str | None:
    value = node.get(key)
    if value is not None and not (isinstance(value, str) and value.strip()):
        raise ConfigError(f"{key} of {where} is {value!r}: write it as text in quotes.")
    return value


def _texts(node: dict[str, Any], key: str, where: str) -> list[str]:
    values = node.get(key, [])
    _check_list(values, f"{key} of {where}")
    for value in values:
        if not isinstance(value, str):
            raise ConfigError(f"{key} of {where}: {value!r} is not of the form key=value.")
    return values
