"""What the runs gave, by variant: table.md, table.csv, runs.csv and results.json."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from co_detr.files import written_whole
from co_detr.tools.ablate.grid import Variant
from co_detr.tools.ablate.run import RunState

TABLE_FILE = "table.md"
_HEADER = (
    *("variant", "seeds", "AP", "best AP", "AP50", "AP75"),
    *("CPU s/iteration", "s/iteration", "minutes", "peak GiB"),
)

# What is known of a finished run. Metrics are from 0 to 100 and of the last evaluation, but for the
# best AP, the highest over all evaluations. CPU time and minutes are of the whole process, seconds
# per iteration clock time of an iteration alone.
_MEASURED: dict[str, Callable[[RunState], float | None]] = {
    "ap": lambda run: run.outcome.final.get("AP"),
    "best_ap": lambda run: run.outcome.best("AP"),
    "ap50": lambda run: run.outcome.final.get("AP50"),
    "ap75": lambda run: run.outcome.final.get("AP75"),
    "iterations": lambda run: run.outcome.saved_iterations,
    "cpu_seconds_per_iteration": lambda run: run.cpu_seconds_per_iteration,
    "seconds_per_iteration": lambda run: run.outcome.seconds_per_iteration,
    "minutes": lambda run: run.wall_seconds / 60,
    "cpu_minutes": lambda run: run.cpu_seconds / 60,
    "peak_gib": lambda run: run.peak_bytes / 2**30,
}


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
    """A variant's finished runs out of those planned; `spreads` by the names of `_MEASURED`."""

    variant: Variant
    finished: int
    planned: int
    spreads: dict[str, Spread | None]

    @classmethod
    def of(cls, variant: Variant, runs: Sequence[RunState]) -> VariantSummary:
        """Runs that are not finished do not count."""
        done = [run for run in runs if run.is_finished]
        spreads = {name: Spread.of(map(value, done)) for name, value in _MEASURED.items()}
        return cls(variant, len(done), len(runs), spreads)

    def as_dict(self) -> dict[str, Any]:
        """For results.json."""
        content = dataclasses.asdict(self)
        spreads = content.pop("spreads")
        return content | spreads

    def as_row(self) -> dict[str, Any]:
        """For table.csv."""
        row = {"variant": self.variant.name, "finished": self.finished, "planned": self.planned}
        for name, spread in self.spreads.items():
            row[f"{name}_mean"] = None if spread is None else spread.mean
            row[f"{name}_std"] = None if spread is None else spread.std
        return row


def write_results(states: Sequence[RunState], output_dir: Path) -> str:
    """Writes all four files, each of them whole; returns the table as text.

    Args:
        states: all runs of the plan, finished or not.
        output_dir: exists.
    """
    by_variant: dict[Variant, list[RunState]] = {}
    for state in states:
        by_variant.setdefault(state.spec.variant, []).append(state)
    summaries = [VariantSummary.of(variant, runs) for variant, runs in by_variant.items()]
    # More than one means that times do not compare.
    attempts = [attempt for state in states for attempt in state.record.attempts]
    environments = list(dict.fromkeys(attempt.environment for attempt in attempts))
    table = _markdown(summaries, states, environments)
    runs = [_run_row(state) for state in states]
    results = {
        "environment": environments,
        "variants": [summary.as_dict() for summary in summaries],
        "runs": runs,
    }
    with written_whole(str(output_dir / TABLE_FILE)) as file:
        file.write(table)
    _write_csv(output_dir / "table.csv", [summary.as_row() for summary in summaries])
    _write_csv(output_dir / "runs.csv", runs)
    with written_whole(str(output_dir / "results.json")) as file:
        json.dump(results, file, indent=1)
        file.write("\n")
    return table


def _markdown(
    summaries: Sequence[VariantSummary], states: Sequence[RunState], environments: Sequence[str]
) -> str:
    rows = [_HEADER, *(_cells(summary) for summary in summaries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = ["| " + " | ".join(row) + " |" for row in (padded[0], rule, *padded[1:])]
    lines += ["", *(f"Environment: {environment}" for environment in environments)]
    if any(state.lost_attempts for state in states if state.is_finished):
        lines.append("Times lack those of processes that were not seen to end; see runs.csv.")
    lines += [
        f"Missing: {state.spec.title}: {state.text()}" for state in states if not state.is_finished
    ]
    return "\n".join(lines) + "\n"


def _cells(summary: VariantSummary) -> tuple[str, ...]:
    seeds = f"{summary.finished}"
    if summary.finished < summary.planned:
        seeds += f" of {summary.planned}"
    spreads = summary.spreads
    digits = {
        "cpu_seconds_per_iteration": 3,
        "seconds_per_iteration": 3,
        "minutes": 1,
        "peak_gib": 2,
    }
    return (
        summary.variant.name.replace("|", "\\|"),
        seeds,
        *(_spread(spreads[name], 1) for name in ("ap", "best_ap", "ap50", "ap75")),
        *(_mean(spreads[name], number) for name, number in digits.items()),
    )


def _spread(value: Spread | None, digits: int) -> str:
    if value is None or value.std is None:
        return _mean(value, digits)
    return f"{value.mean:.{digits}f} ± {value.std:.{digits}f}"


def _mean(value: Spread | None, digits: int) -> str:
    return "–" if value is None else f"{value.mean:.{digits}f}"


def _run_row(state: RunState) -> dict[str, Any]:
    final, outcome = state.outcome.final if state.is_finished else {}, state.outcome
    return {
        "variant": state.spec.variant.name,
        "seed": state.spec.seed,
        "state": "finished" if state.is_finished else state.text(),
        "AP": final.get("AP"),
        "best_AP": outcome.best("AP"),
        "AP50": final.get("AP50"),
        "AP75": final.get("AP75"),
        "iterations": outcome.saved_iterations,
        "wall_seconds": state.wall_seconds,
        "cpu_seconds": state.cpu_seconds,
        "cpu_seconds_per_iteration": state.cpu_seconds_per_iteration,
        "seconds_per_iteration": outcome.seconds_per_iteration,
        "peak_gib": state.peak_bytes / 2**30,
        "attempts": len(state.record.attempts),
        "lost_attempts": state.lost_attempts,
        "folder": str(state.spec.folder),
    }


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with written_whole(str(path)) as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
