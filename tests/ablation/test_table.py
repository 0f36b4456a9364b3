"""Means, deviations and the files that show them."""

import csv
import json
from pathlib import Path

import pytest

from co_detr.tools.ablate.grid import Grid, Variant, plan_runs
from co_detr.tools.ablate.run import Attempt, RunRecord, RunState
from co_detr.tools.ablate.table import Spread, write_results
from tests.ablation.conftest import ENVIRONMENT


def test_mean_and_sample_deviation() -> None:
    assert Spread.of([2.0, 4.0, 9.0]) == Spread(5.0, pytest.approx(13**0.5))  # (9 + 1 + 16) / 2
    assert Spread.of([None, 3.0]) == Spread(3.0, None)
    assert Spread.of([None]) is None


@pytest.fixture
def states(tmp_path: Path, write_run):
    """A has three seeds, two of them finished; B | C one, which is interrupted."""
    grid = Grid(
        (Variant("A", "a.py", ("x=1",), (0, 1, 2)), Variant("B | C", "a.py", ("x=2",), (0,)))
    )
    first, interrupted, second, third = plan_runs(grid, tmp_path)
    write_run(first, [30.0, 20.0], cpu_seconds=8.0)
    write_run(second, [10.0, 23.0], cpu_seconds=4.0)
    third.folder.mkdir()
    interrupted.folder.mkdir(parents=True)
    attempt = Attempt("2026-01-01", ENVIRONMENT, 0)
    RunRecord(interrupted.settings, (attempt,)).write(interrupted.folder)
    return [RunState.read(spec) for spec in (first, interrupted, second, third)]


def test_table(states, tmp_path: Path) -> None:
    lines = write_results(states, tmp_path).splitlines()
    assert lines == (tmp_path / "table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split(" | ")] for line in lines[2:4]]
    # std of 20 and 23: 3 / sqrt(2); of 30 and 23: 7 / sqrt(2); CPU: (8 / 4 + 4 / 4) / 2
    assert rows[0] == [
        *("| A", "2 of 3", "21.5 ± 2.1", "26.5 ± 4.9", "43.0 ± 4.2", "10.8 ± 1.1"),
        *("1.500", "0.150", "1.0", "1.50 |"),
    ]
    assert rows[1] == ["| B \\| C", "0 of 1", *["–"] * 7, "– |"]
    assert lines[5:] == [
        f"Environment: {ENVIRONMENT}",
        "Missing: B | C, seed 0: begun, 0 iterations saved",
        "Missing: A, seed 2: to do",
    ]


def test_files_of_numbers(states, tmp_path: Path) -> None:
    write_results(states, tmp_path)
    with open(tmp_path / "table.csv") as file:
        variants = list(csv.DictReader(file))
    assert [row["variant"] for row in variants] == ["A", "B | C"]
    assert float(variants[0]["ap_std"]) == pytest.approx(3 / 2**0.5)
    assert variants[1]["ap_mean"] == ""
    with open(tmp_path / "runs.csv") as file:
        runs = list(csv.DictReader(file))
    assert [row["AP"] for row in runs] == ["20.0", "", "23.0", ""]
    assert [row["best_AP"] for row in runs] == ["30.0", "", "23.0", ""]
    assert runs[1]["lost_attempts"] == "0"  # it may be under way
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["environment"] == [ENVIRONMENT]
    assert results["variants"][0]["variant"]["overrides"] == ["x=1"]
    assert results["runs"][2]["cpu_seconds_per_iteration"] == 1.0


def test_times_that_are_not_complete_are_named(states, tmp_path: Path) -> None:
    state = states[0]
    lost = Attempt("2026-01-01", ENVIRONMENT, 0)
    RunRecord(state.spec.settings, (lost, *state.record.attempts)).write(state.spec.folder)
    table = write_results([RunState.read(state.spec)], tmp_path)
    assert "Times lack those of processes that were not seen to end; see runs.csv." in table


def test_no_deviation_for_one_seed(states, tmp_path: Path) -> None:
    row = write_results(states[:1], tmp_path).splitlines()[2]
    assert "±" not in row and " 20.0 |" in row
