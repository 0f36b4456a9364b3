"""`key=value` on the command line: the key must exist, the value must be of its kind.

Where a config has text (paths, names, choices), the value is taken as the shell hands it over: no
character in it has a meaning. Elsewhere it is read by Hydra's grammar (numbers, true, [lists],
{dicts: 1}, null).
"""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from co_detr.errors import ConfigError, first_line
from co_detr.moved import DROPPED_KEYS, present_key

logger = logging.getLogger(__name__)

# Keys of plain nodes that are text where they are not null.
TEXT_OR_NULL = (
    "train.best_metric",
    "train.init_checkpoint",
    "train.wandb.name",
    "train.wandb.mode",
    "train.mlflow.name",
    "train.mlflow.tracking_uri",
)
_NUMBERS = {bool, int, float}
_LISTS = {list, tuple, Sequence}


@dataclass(frozen=True)
class _Expected:
    """What a key takes.

    Attributes:
        text: a text; nothing in it is parsed.
        null: also null, which as text has to be quoted.
        lists: also a list.
    """

    text: bool
    null: bool
    lists: bool


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Applies `key=value` overrides in place.

    An override may set a key of the config, or an argument that the config leaves at the default
    of the function or class that it describes. LazyConfig itself would add any key silently.

    Raises:
        ConfigError: if one names no key, or its value is of another kind than the key's.
    """
    for override in overrides:
        key, separator, raw = override.partition("=")
        if not separator or not key or key[0] in "+~":
            raise ConfigError(f"override {override!r} is not of the form key=value.")
        if key in DROPPED_KEYS:
            logger.warning("%s is no key any more, as nothing needs it: leave it out.", key)
            continue
        key = _present_key(cfg, key)
        parent, last = _parent_of(cfg, key)
        old = _resolved(cfg, key)
        expected = _expected(parent, key, last, old)
        if expected.text:
            value = _text(key, raw, expected)
        else:
            value = _checked_value(key, old, _parsed(override).value())
        try:
            OmegaConf.update(cfg, key, value, merge=True, force_add=True)
            OmegaConf.select(cfg, key)  # follows a reference
        except OmegaConfBaseException as error:
            raise ConfigError(
                f"override {override!r} cannot be applied: {first_line(error)}."
            ) from error


def _present_key(cfg: DictConfig, key: str) -> str:
    """What a key of an earlier version is called now, with a warning; any other key as it is."""
    present = present_key(key)
    parts = key.split(".")
    if parts[:2] == ["model", "queries"] and parts[2:3] and parts[2].isdigit():
        # Query sources had numbers in version 0.1.
        sources = OmegaConf.select(cfg, "model.queries") or {}
        names = [name for name in sources if name != "_target_"]
        if int(parts[2]) < len(names):
            present = ".".join([*parts[:2], names[int(parts[2])], *parts[3:]])
    if present != key:
        logger.warning("%s is called %s now: set that one.", key, present)
    return present


def text_override(key: str, text: str) -> str:
    """The override that sets a key to a text as it is, whatever it looks like."""
    # Backslashes count where a quotation mark or the end follows.
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f'{key}="{escaped}"'


def _text(key: str, raw: str, expected: _Expected) -> Any:
    try:
        raw.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"override {key}={raw!r} is not valid UTF-8, as config.yaml is: rename the file."
        ) from error
    if "${" in raw:  # a reference to another key
        return raw
    if raw[:1] in ("'", '"') and raw[-1:] == raw[:1]:
        try:
            quoted = _parsed(f"{key}={raw}")
        except ConfigError:  # not a quoted text, but one with quotation marks in it
            return raw
        return quoted.value() if isinstance(quoted._value, QuotedString) else raw
    if raw.lower() == "null":
        if expected.null:
            return None
        raise ConfigError(
            f"override {key}={raw} must be a text and cannot be null: write "
            f"'{key}=\"{raw}\"' if that is a name."
        )
    if raw[:1] + raw[-1:] in ("[]", "{}"):
        try:
            value = _parsed(f"{key}={raw}").value()
        except ConfigError:
            return raw
        if isinstance(value, list) and expected.lists:
            return value
        raise ConfigError(
            f"override {key}={raw} must be a text and not a "
            f"{'list' if isinstance(value, list) else 'dict'}: give one value, or write "
            f"'{key}=\"{raw}\"' if that is a name."
        )
    if raw == "???":
        raise ConfigError(f"override {key}=??? sets no value: write the text.")
    return os.path.expanduser(raw)  # no shell does it behind `key=`


def _parsed(override: str) -> Override:
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise ConfigError(
            f"override {override!r} is not of the form key=value; quote a value that contains "
            "spaces, commas or brackets, as in 'key=\"a, b\"'."
        ) from error


def _parent_of(cfg: DictConfig, key: str) -> tuple[Any, str]:
    """The node that a key is in, and the key's last part.

    Raises:
        ConfigError: if there is no such key.
    """
    *parents, last = key.split(".")
    node: Any = cfg
    for depth, part in enumerate(parents):
        if part not in _children(node):
            raise _unknown_key(key, parents[:depth], part, _children(node))
        node = node[int(part)] if isinstance(node, ListConfig) else node[part]
    known = _children(node) | set(_arguments_of_target(node))
    if last not in known:
        raise _unknown_key(key, parents, last, known)
    return node, last


def _resolved(cfg: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.select(cfg, key)
    except OmegaConfBaseException:  # it refers to what is not there
        return None


def _unknown_key(key: str, parents: list[str], part: str, known: set[str]) -> ConfigError:
    where = f"{'.'.join(parents)} has" if parents else "the config has"
    near = difflib.get_close_matches(part, known, n=1)
    if near:
        remedy = f"did you mean {'.'.join([*parents, near[0]])}?"
    else:
        remedy = f"{where} {', '.join(sorted(known)) or 'no keys'}."
    return ConfigError(f"override {key} names no key of the config: {remedy}")


def _children(node: Any) -> set[str]:
    if isinstance(node, ListConfig):
        return {str(i) for i in range(len(node))}
    if isinstance(node, DictConfig):
        return {str(key) for key in node}
    return set()


def _expected(parent: Any, key: str, last: str, old: Any) -> _Expected:
    is_text = isinstance(old, str)
    if last == "_target_":
        return _Expected(text=True, null=False, lists=False)
    arguments = _arguments_of_target(parent)
    if not arguments:
        nullable = key in TEXT_OR_NULL
        return _Expected(is_text or (nullable and old is None), nullable, lists=False)
    kinds = arguments.get(last, set())
    if str in kinds:
        is_text = is_text or (old is None and not kinds & _NUMBERS)
        is_text = is_text and not kinds & _NUMBERS
    return _Expected(is_text, null=not kinds or type(None) in kinds, lists=bool(kinds & _LISTS))


def _arguments_of_target(node: Any) -> dict[str, set[Any]]:
    """Named arguments of the callable that a LazyCall node describes, and the kinds they take."""
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if target is None:
        return {}
    if isinstance(target, str):
        target = locate(target)
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return {}
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, AttributeError, TypeError):  # names that only type checkers import
        hints = {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        parameter.name: _kinds(hints.get(parameter.name))
        for parameter in parameters
        if parameter.kind in named
    }


def _kinds(hint: Any) -> set[Any]:
    """The types of an annotation, str also for paths and literals; empty if there is none."""
    if hint is None or hint is Any:
        return set()
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(_kinds, arguments))
    if origin is typing.Literal:
        return {type(choice) for choice in arguments}
    plain = origin or hint
    is_path = inspect.isclass(plain) and issubclass(plain, os.PathLike)
    return {str if is_path else plain}


def _checked_value(key: str, old: Any, new: Any) -> Any:
    """Refuses another kind than the key has, and reads 1e3 as an integer where an integer was."""
    if isinstance(new, str) and "${" in new:
        return new  # a reference such as ${train.seed}, which becomes what the other key is
    if is_dataclass(new):  # Hydra reads several values as the start of several runs
        raise ConfigError(f"override {key} has several values: give one, or a list such as [a,b].")
    if isinstance(old, bool):
        if not isinstance(new, bool):
            raise ConfigError(f"override {key}={new} must be true or false.")
    elif isinstance(old, DictConfig):
        part = "_target_" in old and "." in key  # one of several that can be left out
        if not isinstance(new, dict) and not (part and new is None):
            raise ConfigError(
                f"override {key}={new} would replace a group of keys: name one of these, such as "
                f"{key}.{next(iter(old), 'KEY')}."
            )
    elif new is None:
        return None
    elif isinstance(old, int | float):
        if isinstance(new, bool) or not isinstance(new, int | float):
            raise ConfigError(f"override {key}={new} must be a number, as {old} is.")
        if isinstance(old, int) and isinstance(new, float) and new.is_integer():
            return int(new)
    elif isinstance(old, ListConfig) and isinstance(new, str):
        raise ConfigError(f"override {key}={new} must be a list, such as [a,b].")
    return new
