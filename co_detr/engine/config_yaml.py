"""Configs as YAML: written complete, and read with restrictions.

A run writes its config as config.yaml. A config names the callables that build a run (`_target_`),
so it is code, whatever its format: use configs of people you trust only. The reader keeps a YAML
file to what configs consist of, and runs nothing in it. It knows the tags that `config_text` writes
and no others, and `_target_` may only name parts that detectors are built from, or your own modules
on Python's path; a `.py` config is not restricted.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from typing import Any

import yaml
from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException

from co_detr.errors import ConfigError, first_line
from co_detr.files import written_whole
from co_detr.moved import named_sources, present_name, present_part, rename_keys

logger = logging.getLogger(__name__)

PACKAGES_VARIABLE = "CO_DETR_CONFIG_PACKAGES"
# Modules whose classes and functions build detectors and data. Not all of these packages: they also
# have functions that download, compile or unpickle.
_BUILDING_BLOCKS = (
    "co_detr.data",
    "co_detr.engine.evaluators",
    "co_detr.engine.optim",
    "co_detr.layers",
    "co_detr.modeling",
    "detectron2.data",
    "detectron2.evaluation",
    "detectron2.layers",
    "detectron2.modeling",
    "detectron2.solver",
    "fvcore.common.param_scheduler",
    "fvcore.nn",
    "torch.nn",
    "torch.optim",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
)
_PACKAGES = {name.partition(".")[0] for name in _BUILDING_BLOCKS}
_INSTALLED = ("stdlib", "platstdlib", "purelib", "platlib")
_REFERENCE = re.compile(r"\$\{[\w.\[\]]+\}")  # to another key; not to a resolver such as oc.env
_PYTHON = "tag:yaml.org,2002:python/"


def read_yaml_config(path: str) -> DictConfig:
    """Reads a config.yaml, also one of an earlier version (see `co_detr.moved`).

    Raises:
        ConfigError: if the file is unreadable, or holds anything that a config may not (see above).
    """
    content = read_yaml(path)
    tell_renamed(rename_keys(content), path)
    try:
        content = in_present_terms(content)
        found = list(leaves(content))
    except RecursionError as error:
        raise _refused(path, "a part of it contains itself") from error
    for where, value in found:
        if where.endswith("._target_") or where == "_target_":
            try:
                if not callable(value):  # else the loader has found it by its name
                    _building_block(value)
            except ConfigError as error:
                raise _refused(path, f"{error} ({where})") from error
        elif isinstance(value, str) and "${" in _REFERENCE.sub("", value):
            raise _refused(path, f"{where} is {value!r}, which is no reference to another key")
    try:
        return OmegaConf.create(content, flags={"allow_objects": True})
    except OmegaConfBaseException as error:
        raise ConfigError(f"config file {path} cannot be read ({first_line(error)}).") from error


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping that a YAML config file holds, without a look at its `_target_`s.

    Raises:
        ConfigError: if the file is unreadable, no mapping, or has a tag that configs do not have.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, Loader=_Loader)
    except _RefusedError as error:
        raise _refused(path, str(error)) from error
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" in line {mark.line + 1}"
        reason = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(
            f"config file {path} is no YAML ({reason}{line}): correct it or write it again."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path} has no keys: name the config.yaml of a run.")
    return content


def tell_renamed(renamed: dict[str, str], path: str) -> None:
    """One warning for all old keys of a file."""
    if renamed:
        keys = ", ".join(f"{old} is called {new}" for old, new in renamed.items())
        logger.warning("config file %s is of an earlier version: %s now.", path, keys)


def in_present_terms(content: dict[str, Any]) -> dict[str, Any]:
    """What a YAML file of this or an earlier version holds, as this one writes it."""
    content = _with_present_targets(content)
    model = content.get("model")
    if isinstance(model, dict) and isinstance(model.get("queries"), list):
        model["queries"] = named_sources(model["queries"])
    rename_keys(content)
    return content


def _with_present_targets(node: Any) -> Any:
    """With the names and arguments that described parts have now."""
    if isinstance(node, dict):
        return present_part({key: _with_present_targets(value) for key, value in node.items()})
    if isinstance(node, list | tuple):
        return type(node)(_with_present_targets(value) for value in node)
    return node


def leaves(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Values and where they are; a `_target_` is a leaf whatever it is."""
    children: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(node, dict):
        children = iter(node.items())
    elif isinstance(node, list | tuple):
        children = enumerate(node)
    for key, value in children:
        path = f"{where}.{key}" if where else str(key)
        if isinstance(value, dict | list | tuple) and key != "_target_":
            yield from leaves(value, path)
        else:
            yield path, value


def _refused(path: str, why: str) -> ConfigError:
    return ConfigError(f"config file {path} was refused: {why}.")


class _RefusedError(yaml.YAMLError):
    """The file asks for more than a config may."""


class _Loader(yaml.SafeLoader):
    """Plain YAML, tuples, and names of building blocks."""

    def name(self, suffix: str, node: yaml.Node) -> Any:
        try:
            return _building_block(present_name(suffix))
        except ConfigError as error:
            raise _RefusedError(str(error)) from error

    def tuple(self, node: yaml.Node) -> tuple[Any, ...]:
        return tuple(self.construct_sequence(node, deep=True))

    def refuse(self, node: yaml.Node) -> None:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise _RefusedError(
            f"the tag {tag} in line {node.start_mark.line + 1} is none that configs are written "
            "with, and could run any code"
        )


_Loader.add_constructor(f"{_PYTHON}tuple", _Loader.tuple)
_Loader.add_multi_constructor(f"{_PYTHON}name:", _Loader.name)
_Loader.add_constructor(None, _Loader.refuse)


def _building_block(name: Any) -> Any:
    """What the name stands for.

    Raises:
        ConfigError: if it is neither below `_BUILDING_BLOCKS`, nor the user's own, nor of a package
            that the user allows.
    """
    if isinstance(name, str) and _is_allowed(name):
        try:
            found = locate(name)
        except Exception as error:  # importing may raise anything
            raise ConfigError(
                f"{name} does not exist in this installation, or its import fails "
                f"({first_line(error)})"
            ) from error
        if found is None:
            raise ConfigError(f"{name} does not exist in this installation")
        # A path may lead through a module out of its package, as torch.nn.functional.os.system.
        if _is_allowed(str(getattr(found, "__module__", None))):
            return found
    raise ConfigError(
        f"it names {name}, which is no part that detectors are built from and could run any code; "
        f"if you trust the file, set the environment variable {PACKAGES_VARIABLE} to the packages "
        "that it may use, separated by commas"
    )


def _is_allowed(name: str) -> bool:
    given = os.environ.get(PACKAGES_VARIABLE, "").split(",")
    allowed = (*_BUILDING_BLOCKS, *(package.strip() for package in given if package.strip()))
    if any(name == package or name.startswith(f"{package}.") for package in allowed):
        return True
    root = name.partition(".")[0]
    return root not in _PACKAGES and _is_own_module(root)


def _is_own_module(root: str) -> bool:
    """Whether a top-level module is neither a part of Python nor an installed package."""
    if root in sys.stdlib_module_names or root in sys.builtin_module_names:
        return False
    try:
        # Of a top-level module, this imports nothing. The path comes first, as other finders may
        # have side effects: asked for pip, that of setuptools takes distutils for pip's.
        spec = importlib.machinery.PathFinder.find_spec(root) or importlib.util.find_spec(root)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    places = [spec.origin] if spec.has_location else spec.submodule_search_locations or []
    installed = [os.path.realpath(sysconfig.get_path(name)) for name in _INSTALLED]
    installed += [
        os.path.realpath(path) for path in (*site.getsitepackages(), site.getusersitepackages())
    ]
    return bool(places) and not any(
        os.path.realpath(place).startswith(f"{folder}{os.sep}")
        for place in places
        for folder in installed
    )


def save_config(cfg: DictConfig, path: str) -> None:
    """Writes a complete config as YAML that `load_config` reads."""
    with written_whole(path) as file:
        file.write(config_text(cfg))


def config_text(cfg: DictConfig) -> str:
    """A complete config as YAML that `read_yaml_config` reads."""
    return to_text(config_content(cfg))


def config_content(cfg: DictConfig) -> dict[str, Any]:
    """A complete config as `read_yaml` gives it: references as they are, callables by name."""
    return _with_target_names(
        OmegaConf.to_container(cfg, resolve=False, structured_config_mode=SCMode.INSTANTIATE)
    )


def to_text(content: dict[str, Any]) -> str:
    """YAML in which keys keep their order.

    That of auxiliary heads is the one of the model's parameters, which an earlier version's saved
    optimizer knows by their numbers.
    """
    return yaml.dump(
        content, sort_keys=False, default_flow_style=None, allow_unicode=True, width=9999
    )


def _with_target_names(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            key: _convert_target_to_string(value)
            if key == "_target_" and callable(value)
            else _with_target_names(value)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_with_target_names(value) for value in node]
    return node
