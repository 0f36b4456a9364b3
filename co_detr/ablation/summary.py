"""Means and deviations over the runs of a variant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from co_detr.ablation.grid import Variant
from co_detr.ablation.run import RunState


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1); that of a single value is None."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Of the values that are known; None if there is none."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(mean(known), stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True)
class VariantSummary:
    """A variant's finished runs.

    Attributes:
        variant: what was trained.
        finished, planned: numbers of runs.
        ap, ap50, ap75: of the last evaluation, from 0 to 100.
        best_ap: the highest over all evaluations of a run.
        iterations: of the training.
        cpu_seconds_per_iteration: CPU time of the whole process by iterations.
        seconds_per_iteration: clock time of an iteration alone.
        minutes, cpu_minutes: of the whole process.
        peak_gib: memory.
    """

    variant: Variant
    finished: int
    planned: int
    ap: Spread | None
    best_ap: Spread | None
    ap50: Spread | None
    ap75: Spread | None
    iterations: Spread | None
    cpu_seconds_per_iteration: Spread | None
    seconds_per_iteration: Spread | None
    minutes: Spread | None
    cpu_minutes: Spread | None
    peak_gib: Spread | None


def summarise(variant: Variant, states: Sequence[RunState]) -> VariantSummary:
    """Summarises the runs of one variant; those that are not finished do not count."""
    done = [state for state in states if state.is_finished]

    def final(metric: str) -> Spread | None:
        return Spread.of(state.outcome.final.get(metric) for state in done)

    return VariantSummary(
        variant=variant,
        finished=len(done),
        planned=len(states),
        ap=final("AP"),
        best_ap=Spread.of(state.outcome.best("AP") for state in done),
        ap50=final("AP50"),
        ap75=final("AP75"),
        iterations=Spread.of(state.outcome.saved_iterations for state in done),
        cpu_seconds_per_iteration=Spread.of(state.cpu_seconds_per_iteration for state in done),
        seconds_per_iteration=Spread.of(state.outcome.seconds_per_iteration for state in done),
        minutes=Spread.of(state.wall_seconds / 60 for state in done),
        cpu_minutes=Spread.of(state.cpu_seconds / 60 for state in done),
        peak_gib=Spread.of(state.peak_bytes / 2**30 for state in done),
    )
