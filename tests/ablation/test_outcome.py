"""What the files of a training say."""

import json
from pathlib import Path

import pytest

from co_detr.tools.ablate.run import Outcome, read_outcome
from tests.ablation.conftest import write_log


def write(folder: Path, marker: str, trained: int, evaluated: list[int]) -> Outcome:
    (folder / "last_checkpoint").write_text(marker)
    write_log(folder, trained)
    metrics = {str(steps): {"AP": 40.0 - steps, "AP50": 50.0} for steps in evaluated}
    (folder / "evaluations.json").write_text(json.dumps(metrics))
    return read_outcome(folder)


def test_a_finished_run(tmp_path: Path) -> None:
    outcome = write(tmp_path, "model_final.pth", 10, [5, 10])
    assert outcome.is_finished and outcome.saved_iterations == 10
    assert outcome.final == {"AP": 30.0, "AP50": 50.0}
    assert outcome.best("AP") == 35.0 and outcome.best("APs") is None
    assert outcome.seconds_per_iteration == pytest.approx(0.45)  # of 0.0, 0.1, ... 0.9
    assert outcome.gpu_peak_bytes == 0


def test_a_final_evaluation_that_was_interrupted(tmp_path: Path) -> None:
    outcome = write(tmp_path, "model_final.pth", 10, [5])
    assert not outcome.is_finished and outcome.saved_iterations == 10


def test_an_early_stop_is_finished(tmp_path: Path) -> None:
    assert write(tmp_path, "model_final.pth", 6, [3, 6]).is_finished


def test_the_last_checkpoint_is_not_the_final_one(tmp_path: Path) -> None:
    outcome = write(tmp_path, "model_0000005.pth", 8, [3])
    assert not outcome.is_finished and outcome.saved_iterations == 6


def test_an_undefined_ap_is_finished(tmp_path: Path) -> None:
    write(tmp_path, "model_final.pth", 2, [])
    (tmp_path / "evaluations.json").write_text('{"2": {}}')
    outcome = read_outcome(tmp_path)
    assert outcome.is_finished and outcome.final == {} and outcome.best("AP") is None


def test_nothing_there(tmp_path: Path) -> None:
    assert read_outcome(tmp_path / "none") == Outcome(0, {}, False, None, 0)


def test_half_a_line_and_a_damaged_history(tmp_path: Path) -> None:
    write(tmp_path, "model_0000003.pth", 4, [2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "total')
    (tmp_path / "evaluations.json").write_text("{")
    outcome = read_outcome(tmp_path)
    assert outcome.seconds_per_iteration == pytest.approx(0.15)
    assert outcome.evaluations == {}


def test_peak_memory_of_a_gpu_is_logged(tmp_path: Path) -> None:
    lines = [{"iteration": 19, "gpu_peak_mib": 900.0}, {"iteration": 39, "gpu_peak_mib": 1100.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_outcome(tmp_path).gpu_peak_bytes == 1100.5 * 2**20
