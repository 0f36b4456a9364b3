"""Writes what the runs gave: table.md, table.csv, runs.csv, results.json."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from co_detr.ablation.run import RunState
from co_detr.ablation.summary import Spread, VariantSummary, summarise
from co_detr.files import written_whole

TABLE_FILE = "table.md"
_HEADER = (
    *("variant", "seeds", "AP", "best AP", "AP50", "AP75"),
    *("CPU s/iteration", "s/iteration", "minutes", "peak GiB"),
)


def write_results(states: Sequence[RunState], output_dir: Path) -> str:
    """Writes all four files, each of them whole; returns the table as text.

    Args:
        states: all runs of the plan, finished or not.
        output_dir: exists.
    """
    variants = dict.fromkeys(state.spec.variant for state in states)
    summaries = [
        summarise(variant, [state for state in states if state.spec.variant == variant])
        for variant in variants
    ]
    environments = _environments(states)
    table = _markdown(summaries, states, environments)
    runs = [_run_row(state) for state in states]
    results = {
        "environment": environments,
        "variants": [dataclasses.asdict(summary) for summary in summaries],
        "runs": runs,
    }
    with written_whole(str(output_dir / TABLE_FILE)) as file:
        file.write(table)
    _write_csv(output_dir / "table.csv", [_flat(summary) for summary in summaries])
    _write_csv(output_dir / "runs.csv", runs)
    with written_whole(str(output_dir / "results.json")) as file:
        json.dump(results, file, indent=1)
        file.write("\n")
    return table


def _environments(states: Sequence[RunState]) -> list[str]:
    """The different ones of all attempts; more than one means that times do not compare."""
    return list(
        dict.fromkeys(each.environment for state in states for each in state.record.attempts)
    )


def _markdown(
    summaries: Sequence[VariantSummary], states: Sequence[RunState], environments: Sequence[str]
) -> str:
    rows = [_HEADER, *(_cells(summary) for summary in summaries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = ["| " + " | ".join(row) + " |" for row in (padded[0], rule, *padded[1:])]
    lines += ["", *(f"Environment: {each}" for each in environments)]
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
    return (
        summary.variant.name.replace("|", "\\|"),
        seeds,
        *(_spread(each, 1) for each in (summary.ap, summary.best_ap, summary.ap50, summary.ap75)),
        *(
            _mean(each, digits)
            for each, digits in (
                (summary.cpu_seconds_per_iteration, 3),
                (summary.seconds_per_iteration, 3),
                (summary.minutes, 1),
                (summary.peak_gib, 2),
            )
        ),
    )


def _spread(value: Spread | None, digits: int) -> str:
    if value is None or value.std is None:
        return _mean(value, digits)
    return f"{value.mean:.{digits}f} ± {value.std:.{digits}f}"


def _mean(value: Spread | None, digits: int) -> str:
    return "–" if value is None else f"{value.mean:.{digits}f}"


def _flat(summary: VariantSummary) -> dict[str, Any]:
    row = {"variant": summary.variant.name}
    for field in dataclasses.fields(summary):
        value = getattr(summary, field.name)
        if field.name in ("finished", "planned"):
            row[field.name] = value
        elif field.name != "variant":
            row[f"{field.name}_mean"] = None if value is None else value.mean
            row[f"{field.name}_std"] = None if value is None else value.std
    return row


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
