"""Folders of runs, and a grid that is run without training."""

import dataclasses
import json
from pathlib import Path

import pytest

from co_detr.tools.ablate import run
from co_detr.tools.ablate.grid import Grid, RunSpec, Variant, plan_runs
from co_detr.tools.ablate.run import Attempt, AttemptEnd, RunRecord, RunState
from co_detr.tools.ablate.runner import Pace, Report, Runner, exclusive

ENVIRONMENT = "torch 9, abacus"


@dataclasses.dataclass
class FakeGrid:
    """Trainings by fake_train_net.py.

    Attributes:
        output_dir: of all runs.
        variants: name -> overrides and seeds.
    """

    output_dir: Path
    variants: dict[str, tuple[list[str], list[int]]]

    @property
    def specs(self) -> list[RunSpec]:
        made = [
            Variant(name, "config.py", tuple(overrides), tuple(seeds))
            for name, (overrides, seeds) in self.variants.items()
        ]
        return plan_runs(Grid(tuple(made)), self.output_dir)

    def run(self, jobs: int = 1, budget: float | None = None, after_run=lambda: None) -> Report:
        with exclusive(self.output_dir) as lock:
            return Runner(self.specs, Pace(jobs, 1, budget), after_run, lock).run()

    @property
    def calls(self) -> list[str]:
        """Variant's folder, seed's folder and number of threads of every process, in order."""
        path = self.output_dir / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def states(self) -> list[RunState]:
        return [RunState.read(spec) for spec in self.specs]


@pytest.fixture
def fake_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGrid:
    """Two variants with two seeds and one."""
    fake = str(Path(__file__).parent / "fake_train_net.py")
    monkeypatch.setattr(run, "training_program", lambda: [fake])
    return FakeGrid(tmp_path / "grid", {"A": ([], [0, 1]), "B": ([], [0])})


@pytest.fixture
def write_run():
    """`write_run(spec, [10.0, 30.0])`: a finished run with that AP after 2, 4, ... iterations."""

    def write(spec: RunSpec, aps: list[float], cpu_seconds: float = 8.0, gib: float = 1.5) -> None:
        spec.folder.mkdir(parents=True)
        steps = 2 * len(aps)
        evaluations = {
            str(2 * n): {"AP": ap, "AP50": 2 * ap, "AP75": ap / 2} for n, ap in enumerate(aps, 1)
        }
        (spec.folder / "evaluations.json").write_text(json.dumps(evaluations))
        write_log(spec.folder, steps)
        (spec.folder / "last_checkpoint").write_text("model_final.pth")
        end = AttemptEnd(0, steps, 60.0, cpu_seconds, int(gib * 2**30), None)
        attempt = Attempt("2026-01-01T00:00:00+00:00", ENVIRONMENT, 0, end)
        RunRecord(spec.settings, (attempt,)).write(spec.folder)

    return write


def write_log(folder: Path, iterations: int) -> None:
    lines = [
        json.dumps({"iteration": i, "total_loss": 2.0, "time": 0.1 * i}) for i in range(iterations)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
