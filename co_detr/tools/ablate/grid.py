"""What an ablation compares: variants of a training, each with its seeds, as a plan of runs.

A grid comes from a YAML file (`read_grid_file`, described in docs/ablation.md) or is made of all
combinations of heads, positive queries and loss weights (`combine`).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from co_detr.engine.config import load_config
from co_detr.engine.overrides import text_override
from co_detr.errors import ConfigError, first_line
from co_detr.modeling.auxiliary import HybridAssignmentHeads
from co_detr.tools.ablate import NO_HEADS, OFF, ON

# The grid gives each run its own.
_OWN_KEYS = ("train.seed", "train.output_dir")

_GRID_KEYS = ("config", "overrides", "seeds", "variants")
_VARIANT_KEYS = ("name", "config", "overrides", "seeds")
_AUXILIARY = "model.auxiliary"
_QUERIES = f"{_AUXILIARY}.positive_queries"


class _Choice(NamedTuple):
    """What the value of an axis adds to the label and to the overrides of a variant."""

    label: str = ""
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: free text for the table.
        config: path of the experiment, relative to the current directory.
        overrides: `key=value`, in the order in which they are applied.
        seeds: of its runs.

    Raises:
        ConfigError: if the name gives no folder name, a seed is wrong, or an override sets what
            differs from run to run.
    """

    name: str
    config: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.slug:
            raise ConfigError(
                f"variant name {self.name!r} gives no folder name: use some of a-z and 0-9 in it."
            )
        check_seeds(self.seeds, f"variant {self.name!r}")
        for override in self.overrides:
            key = override.partition("=")[0].strip()
            if key in _OWN_KEYS:
                raise ConfigError(
                    f"override {override!r}: {key} is set for each run; use seeds and --output-dir."
                )

    @property
    def slug(self) -> str:
        """Name of its folder: lower-case letters, digits, dot and underscore, joined by `-`."""
        return re.sub(r"[^a-z0-9._]+", "-", self.name.lower()).strip("-.")


@dataclass(frozen=True)
class Grid:
    """All variants, in the order of the table.

    Raises:
        ConfigError: if there is none, or two have the same name or folder.
    """

    variants: tuple[Variant, ...]

    def __post_init__(self) -> None:
        if not self.variants:
            raise ConfigError("the grid has no variants: list at least one.")
        name = _repeated([variant.name for variant in self.variants])
        if name is not None:
            raise ConfigError(f"two variants have the name {name!r}: give each its own.")
        slug = _repeated([variant.slug for variant in self.variants])
        if slug is not None:
            names = [variant.name for variant in self.variants if variant.slug == slug]
            raise ConfigError(
                f"variants {names[0]!r} and {names[1]!r} would share the folder {slug}: rename one."
            )


@dataclass(frozen=True)
class RunSpec:
    """One training.

    Attributes:
        variant: what is trained.
        seed: of weights, order of the data and augmentation.
        folder: where it writes.
    """

    variant: Variant
    seed: int
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def settings(self) -> list[str]:
        """Everything that makes this run: the config and all overrides."""
        return [self.variant.config, *self.variant.overrides, f"train.seed={self.seed}"]

    @property
    def arguments(self) -> list[str]:
        """Arguments of train_net.py."""
        config, *overrides = self.settings
        output_dir = text_override("train.output_dir", str(self.folder))
        return ["--config-file", config, "--resume", *overrides, output_dir]


def plan_runs(grid: Grid, output_dir: Path) -> list[RunSpec]:
    """Round-robin: the first seed of every variant comes before the second one of any."""
    rounds = max(len(variant.seeds) for variant in grid.variants)
    return [
        RunSpec(variant, seed, output_dir / variant.slug / f"seed{seed}")
        for turn in range(rounds)
        for variant in grid.variants
        for seed in variant.seeds[turn : turn + 1]
    ]


def check_configs(grid: Grid) -> None:
    """Loads every variant's config, so that a mistake shows before hours of training.

    Raises:
        ConfigError: if a config or override is wrong, or keeps no history of evaluations.
    """
    for variant in grid.variants:
        try:
            cfg = load_config(variant.config, variant.overrides)
        except ConfigError as error:
            raise ConfigError(f"variant {variant.name!r}: {error.sentence}") from error
        if cfg.train.get("best_metric") is None:
            raise ConfigError(
                f"variant {variant.name!r} has train.best_metric=null, which keeps no "
                "evaluations.json to read results from: set train.best_metric=AP."
            )


def check_seeds(seeds: Sequence[Any], owner: str) -> None:
    """Raises ConfigError unless there are whole numbers of at least 0, none of them twice."""
    whole = all(type(seed) is int and seed >= 0 for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"seeds of {owner} are {list(seeds)}: give different whole numbers of at least 0."
        )


def _repeated(names: list[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


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
        raise ConfigError(
            f"grid file {path} is no YAML ({first_line(error)}): correct it."
        ) from error
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
            own = (*overrides, *choice.overrides)
            variants.append(Variant(choice.label, config, own, tuple(seeds)))
    return Grid(tuple(variants))


def _head_names(config: str, auxiliary: DictConfig | None) -> list[str]:
    if auxiliary is None:
        raise ConfigError(f"{config} has no auxiliary heads to combine: choose another config.")
    return HybridAssignmentHeads.head_names(auxiliary)


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
    own = [_Choice()]
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
