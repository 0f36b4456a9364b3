"""What an ablation compares: variants of a training, each with its seeds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from co_detr.errors import ConfigError

# The grid gives each run its own.
_OWN_KEYS = ("train.seed", "train.output_dir")


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


def check_seeds(seeds: Sequence[Any], owner: str) -> None:
    """Raises ConfigError unless there are whole numbers of at least 0, none of them twice."""
    whole = all(type(seed) is int and seed >= 0 for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"seeds of {owner} are {list(seeds)}: give different whole numbers of at least 0."
        )


def _repeated(names: list[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)
