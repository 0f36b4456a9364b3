"""The runs of a grid in the order in which they are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from co_detr.ablation.grid import Grid, Variant
from co_detr.engine.config import load_config
from co_detr.engine.overrides import text_override
from co_detr.errors import ConfigError


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
        RunSpec(variant, variant.seeds[turn], _folder(output_dir, variant, variant.seeds[turn]))
        for turn in range(rounds)
        for variant in grid.variants
        if turn < len(variant.seeds)
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


def _folder(output_dir: Path, variant: Variant, seed: int) -> Path:
    return output_dir / variant.slug / f"seed{seed}"
