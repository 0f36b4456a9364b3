"""Makes a grid of all combinations of heads, positive queries and loss weights."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from omegaconf import DictConfig

from co_detr.ablation.grid import Grid, Variant
from co_detr.engine.config import load_config
from co_detr.errors import ConfigError
from co_detr.modeling.auxiliary import HybridAssignmentHeads

NO_HEADS = "none"
ON, OFF = "on", "off"

_AUXILIARY = "model.auxiliary"
_QUERIES = f"{_AUXILIARY}.positive_queries"


@dataclass(frozen=True)
class Axes:
    """What to combine; an empty axis leaves the config's own value.

    Attributes:
        heads: each names heads joined by `+`, or is `none` (K = 0), to which no other axis applies.
        positive_queries: `on` or `off`; to `off`, lambda_1 does not apply.
        lambda_1: loss weights of the positive queries.
        lambda_2: loss weights of the heads.
    """

    heads: tuple[str, ...] = ()
    positive_queries: tuple[str, ...] = ()
    lambda_1: tuple[float, ...] = ()
    lambda_2: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Choice:
    """A value of an axis: what it adds to the name and to the overrides."""

    label: str = ""
    overrides: tuple[str, ...] = ()


def combine(config: str, axes: Axes, seeds: Sequence[int], overrides: Sequence[str] = ()) -> Grid:
    """The grid of all combinations that differ.

    Args:
        config: of all variants.
        axes: to combine.
        seeds: of every variant.
        overrides: of every variant, applied first.

    Raises:
        ConfigError: if the config has no auxiliary heads, not these, or no positive queries to
            keep; if a combination is asked for twice.
    """
    auxiliary = load_config(config, overrides).model.get("auxiliary")
    present = _head_names(config, auxiliary)
    if ON in axes.positive_queries and auxiliary.get("positive_queries") is None:
        raise ConfigError(f"{config} has no {_QUERIES} for --positive-queries on: leave it out.")
    variants = []
    for heads in axes.heads or ("+".join(present),):
        if heads == NO_HEADS:
            choices = [_Choice("K=0", (f"{_AUXILIARY}=null",))]
        else:
            head = _choice_of_heads(heads, present, config)
            choices = [_join(head, *rest) for rest in _other_axes(axes)]
        for choice in choices:
            everything = (*overrides, *choice.overrides)
            variants.append(Variant(choice.label, config, everything, tuple(seeds)))
    return Grid(tuple(variants))


def _head_names(config: str, auxiliary: DictConfig | None) -> list[str]:
    if auxiliary is None:
        raise ConfigError(f"{config} has no auxiliary heads to combine: choose another config.")
    parameters = inspect.signature(HybridAssignmentHeads).parameters
    no_heads = {"_target_", *parameters}
    return [name for name in auxiliary if name not in no_heads and auxiliary[name] is not None]


def _choice_of_heads(text: str, present: Sequence[str], config: str) -> _Choice:
    asked = text.split("+")
    for name in asked:
        if name not in present:
            raise ConfigError(
                f"--heads {text}: {config} has no head {name!r}; it has {', '.join(present)} "
                f"({NO_HEADS}: K = 0)."
            )
    if len(set(asked)) < len(asked):
        raise ConfigError(f"--heads {text} names a head twice: name each once.")
    kept = [name for name in present if name in asked]
    off = tuple(f"{_AUXILIARY}.{name}=null" for name in present if name not in asked)
    return _Choice(f"K={len(kept)} {'+'.join(kept)}", off)


def _other_axes(axes: Axes) -> list[tuple[_Choice, ...]]:
    own = (_Choice(),)
    lambda_1 = [_weight("lambda_1", f"{_QUERIES}.loss_weight", value) for value in axes.lambda_1]
    lambda_2 = [_weight("lambda_2", f"{_AUXILIARY}.lambda_2", value) for value in axes.lambda_2]
    combinations: list[tuple[_Choice, ...]] = []
    for switch in axes.positive_queries or ("",):
        if switch == OFF:
            queries, weights = _Choice("queries off", (f"{_QUERIES}=null",)), own
        else:
            queries, weights = _Choice(f"queries {ON}" if switch else ""), lambda_1 or own
        combinations += product((queries,), weights, lambda_2 or own)
    return combinations


def _weight(label: str, key: str, value: float) -> _Choice:
    return _Choice(f"{label}={value:g}", (f"{key}={value!r}",))


def _join(*choices: _Choice) -> _Choice:
    label = ", ".join(choice.label for choice in choices if choice.label)
    return _Choice(label, tuple(text for choice in choices for text in choice.overrides))
