"""Runs of a grid: order, failures, interruptions, budget. No training takes place here."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

import co_detr
from co_detr.errors import CheckpointError, ConfigError
from co_detr.tools.ablate import run, runner
from co_detr.tools.ablate.run import RECORD_FILE, RunState
from tests.paths import ROOT, python_path


def kill_this_process_when(happened) -> threading.Thread:
    """Sends SIGTERM to this process as soon as `happened()`."""

    def watch() -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if happened():
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_all_runs_in_order_and_never_again(fake_grid) -> None:
    reports = []
    report = fake_grid.run(after_run=lambda: reports.append(fake_grid.states()))
    assert fake_grid.calls == ["a seed0 1", "b seed0 1", "a seed1 1"]
    assert (report.left, report.failed, report.signal_number) == (0, [], None)
    # Each is on the disk when the table is written.
    assert [sum(state.is_finished for state in states) for states in reports] == [1, 2, 3]
    assert fake_grid.run().left == 0
    assert len(fake_grid.calls) == 3


def test_facts_of_a_run(fake_grid) -> None:
    fake_grid.run()
    state = fake_grid.states()[2]
    assert state.text() == "done, AP 11.0"
    assert state.outcome.best("AP") == 50.0
    assert 0.005 < state.cpu_seconds < 5
    assert state.cpu_seconds_per_iteration == pytest.approx(state.cpu_seconds / 4)
    assert state.wall_seconds > 0
    assert 2**22 < state.peak_bytes < 2**31  # of a Python process


def test_several_at_once(fake_grid) -> None:
    fake_grid.variants = {"A": (["seconds=0.3"], [0, 1])}
    start = time.monotonic()
    fake_grid.run(jobs=2)
    first, second = fake_grid.states()
    assert first.is_finished and second.is_finished
    assert time.monotonic() - start < first.wall_seconds + second.wall_seconds


def test_gpus_are_given_in_turn(fake_grid, monkeypatch) -> None:
    monkeypatch.setattr(runner, "visible_gpus", lambda: ["3", "5"])
    fake_grid.variants = {"A": (["seconds=0.2"], [0, 1, 2])}
    fake_grid.run(jobs=3)
    given = [(spec.folder / "gpu").read_text() for spec in fake_grid.specs]
    assert given == ["3", "5", "3"]


def test_a_failure_does_not_stop_the_others_and_can_be_fixed(fake_grid) -> None:
    fake_grid.variants["A"] = (["fail=true"], [0, 1])
    report = fake_grid.run()
    assert report.left == 2
    assert [state.spec.title for state in report.failed] == ["A, seed 0", "A, seed 1"]
    assert report.failed[0].record.problem == "image 7.png is missing: put it there."
    assert fake_grid.states()[0].text() == "failed: image 7.png is missing: put it there."
    assert fake_grid.states()[1].is_finished

    (fake_grid.output_dir / "fixed").touch()
    report = fake_grid.run()
    assert (report.left, report.failed) == (0, [])
    assert len(fake_grid.calls) == 5  # B is not run again
    assert len(fake_grid.states()[0].record.attempts) == 2


def test_a_signal_stops_and_the_next_call_goes_on(fake_grid) -> None:
    fake_grid.variants["A"] = (["seconds=0.3"], [0, 1])
    marker = fake_grid.output_dir / "a" / "seed0" / "last_checkpoint"
    watcher = kill_this_process_when(marker.exists)
    report = fake_grid.run()
    watcher.join()
    assert (report.left, report.failed, report.signal_number) == (3, [], signal.SIGTERM)
    assert fake_grid.calls == ["a seed0 1"]
    before = fake_grid.states()[0]
    done = before.outcome.saved_iterations
    assert 0 < done < 4 and before.text() == f"begun, {done} iterations saved"

    assert fake_grid.run().left == 0
    after = fake_grid.states()[0]
    assert [attempt.first_iteration for attempt in after.record.attempts] == [0, done]
    assert after.cpu_seconds > before.cpu_seconds and after.wall_seconds > before.wall_seconds
    assert after.cpu_seconds_per_iteration == pytest.approx(after.cpu_seconds / 4)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the process in /proc")
def test_a_training_that_someone_else_stops_is_reported(fake_grid) -> None:
    fake_grid.variants = {"A": (["seconds=0.2"], [0])}

    def stop_it() -> None:
        path = fake_grid.output_dir / "a" / "seed0" / "last_checkpoint"
        while not path.exists():
            time.sleep(0.01)
        children = f"/proc/{os.getpid()}/task/{os.getpid()}/children"
        for child in open(children).read().split():
            if "fake_train_net" in open(f"/proc/{child}/cmdline").read():
                os.kill(int(child), signal.SIGTERM)

    thread = threading.Thread(target=stop_it, daemon=True)
    thread.start()
    report = fake_grid.run()
    thread.join()
    assert "a signal from elsewhere" in report.failed[0].record.problem


def test_no_budget_starts_nothing(fake_grid) -> None:
    report = fake_grid.run(budget=0.0)
    assert (report.left, report.failed, report.signal_number) == (3, [], None)
    assert fake_grid.calls == []


def test_at_the_end_of_the_budget_trainings_save_and_stop(fake_grid, monkeypatch) -> None:
    fake_grid.variants["A"] = (["seconds=0.5"], [0, 1])
    marker = fake_grid.output_dir / "a" / "seed0" / "last_checkpoint"
    # An hour passes as soon as something is saved.
    clock = SimpleNamespace(monotonic=lambda: 3600.0 * marker.exists(), sleep=time.sleep)
    monkeypatch.setattr(runner, "time", clock)
    report = fake_grid.run(budget=1800.0)
    assert (report.left, report.failed) == (3, [])
    assert fake_grid.calls == ["a seed0 1"]
    state = fake_grid.states()[0]
    assert 0 < state.outcome.saved_iterations < 4 and state.record.problem is None


def test_other_settings_are_refused(fake_grid) -> None:
    fake_grid.run()
    fake_grid.variants["B"] = (["more=1"], [0])
    with pytest.raises(ConfigError, match="b/seed0 holds a run with other settings .*more=1"):
        fake_grid.run()


def test_a_training_of_someone_else_is_refused(fake_grid) -> None:
    folder = fake_grid.specs[0].folder
    folder.mkdir(parents=True)
    (folder / "model_final.pth").touch()
    with pytest.raises(ConfigError, match="not of a grid"):
        fake_grid.run()


def test_a_damaged_record_is_one_sentence(fake_grid) -> None:
    folder = fake_grid.specs[0].folder
    folder.mkdir(parents=True)
    for text in ("{", "[]", '{"settings": [], "attempts": [{}]}'):
        (folder / RECORD_FILE).write_text(text)
        with pytest.raises(CheckpointError, match="is no record of a run"):
            RunState.read(fake_grid.specs[0])


def test_an_attempt_without_end_is_known(fake_grid) -> None:
    fake_grid.variants = {"A": ([], [0])}
    fake_grid.run()
    path = fake_grid.specs[0].folder / RECORD_FILE
    content = json.loads(path.read_text())
    content["attempts"][0]["end"] = None  # as a killed ablate.py leaves it
    path.write_text(json.dumps(content))
    (state,) = fake_grid.states()
    assert state.is_finished  # the training has come to its end by itself
    assert state.lost_attempts == 1
    assert state.cpu_seconds_per_iteration is None


def test_two_calls_at_once_are_refused(fake_grid) -> None:
    def again() -> None:
        with pytest.raises(ConfigError, match="another call still write"):
            fake_grid.run()

    fake_grid.variants = {"A": ([], [0])}
    fake_grid.run(after_run=again)
    assert fake_grid.calls == ["a seed0 1"]


def test_without_the_repository_the_package_trains(monkeypatch, tmp_path) -> None:
    assert run.training_program() == [str(ROOT / "train_net.py")]
    monkeypatch.setattr(co_detr, "__file__", str(tmp_path / "co_detr" / "__init__.py"))
    command = [sys.executable, *run.training_program(), "--help"]
    said = subprocess.run(
        command, env={"PYTHONPATH": python_path()}, cwd=tmp_path, capture_output=True, text=True
    )
    assert said.returncode == 0 and "--config-file" in said.stdout, said.stderr
