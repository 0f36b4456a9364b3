"""The command that checks a machine with a GPU: its runner, and the figures that it reads."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.gpu.check import Check, parse_arguments
from scripts.gpu.stages import Stage, gpu_stages, operator_figures, rehearsal_stages, step_figures
from tests.paths import ROOT


def python(code):
    return [sys.executable, "-c", code]


@dataclass
class Ran:
    """What a check of some stages left."""

    status: int
    by_stage: dict
    log: str
    files: set


@pytest.fixture
def run(tmp_path):
    def run(*stages, at_once=False, minutes=1.0):
        status = Check(stages, tmp_path, minutes, at_once).run()
        summary = json.loads((tmp_path / "summary.json").read_text())["stages"]
        files = {path.name for path in tmp_path.iterdir()}
        by_stage = {stage["stage"]: stage for stage in summary}
        return Ran(status, by_stage, (tmp_path / "log.txt").read_text(), files)

    return run


def test_a_failed_stage_does_not_keep_the_others_from_running(run, capsys):
    ran = run(
        Stage("breaks", python("print('the reason'); raise SystemExit(3)"), 60),
        Stage("works", python("print('figures: {\"AP\": 12.5}')"), 60, group=1),
        Stage("nothing to do", None, 60, group=2, note="no such tool"),
    )
    assert ran.status == 1
    statuses = {name: stage["status"] for name, stage in ran.by_stage.items()}
    assert statuses == {"breaks": "failed", "works": "passed", "nothing to do": "left out"}
    assert ran.by_stage["breaks"]["note"] == "exit status 3"
    assert ran.by_stage["works"]["figures"] == {"AP": 12.5}
    assert ran.files == {"summary.json", "log.txt"} and "the reason" in ran.log
    said = capsys.readouterr().out
    assert "AP: 12.5" in said and "no such tool" in said and "the reason" in said


def test_status_0_if_all_passed(run):
    assert run(Stage("works", python("pass"), 60), Stage("no tool", None, 1)).status == 0


@pytest.mark.parametrize("at_once", [False, True])
def test_a_stage_that_hangs_is_ended_with_its_children(run, tmp_path, at_once):
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    code = (
        "import subprocess, sys, time;"
        f"subprocess.Popen([sys.executable, '-c', {child + '; time.sleep(600)'!r}]);"
        "print('before'); sys.stdout.flush(); time.sleep(600)"
    )
    ran = run(
        Stage("hangs", python(code), 5), Stage("works", python("print(1)"), 60), at_once=at_once
    )
    assert ran.by_stage["hangs"]["status"] == "timed out" and "before" in ran.log
    assert ran.by_stage["works"]["status"] == "passed"
    pid = int((tmp_path / "pid").read_text())
    assert not is_running(pid)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_stage_starts_when_the_time_is_over(run):
    ran = run(Stage("late", python("pass"), 60), minutes=0.0)
    assert ran.status == 1 and ran.by_stage["late"]["status"] == "not run"


def test_figures_that_cannot_be_read_are_a_failure(run):
    ran = run(Stage("odd", python("print('figures: {')"), 60))
    assert ran.by_stage["odd"]["status"] == "failed"
    assert "cannot be read" in ran.by_stage["odd"]["note"]


def test_both_lists_have_the_same_stages_and_few_files(tmp_path, monkeypatch):
    rehearsed = [stage.name for stage in rehearsal_stages(tmp_path, None)]
    assert sorted(rehearsed) == sorted(stage.name for stage in gpu_stages(tmp_path, "data"))
    monkeypatch.setenv("OUT", str(tmp_path))
    options = parse_arguments(["--rehearse", "--only", "build"])
    assert options.out == tmp_path and [stage.name for stage in options.stages] == ["build"]
    with pytest.raises(SystemExit):
        parse_arguments(["--only", "nothing"])


def test_scripts_of_the_stages_exist(tmp_path):
    for stage in gpu_stages(tmp_path, None):
        for word in stage.command or ():
            if word.endswith(".py") or word.startswith("tests/"):
                assert (ROOT / word).exists(), word


def test_figures_of_the_benchmarks(tmp_path):
    results = ROOT / "benchmarks" / "results"
    found = operator_figures(results / "ms_deform_attn_cpu_epyc.json", "enc-640x896-B1")
    assert found["fp32 forward ms"] == pytest.approx(9.3, abs=0.5)
    assert found["fp32 forward x reference eager"] > 10
    found = step_figures(results / "train_step_cpu_epyc.json")
    assert set(found) == {f"train fp32 {name}" for name in ("k0", "k2")}
    assert found["train fp32 k0"].endswith(" ms, 4.3 GiB")


def test_the_quick_stages_pass(tmp_path):
    """The others are rehearsed by .ci/run."""
    result = subprocess.run(
        ["bash", "scripts/check_gpu.sh", "--rehearse", "--only", "environment", "memcheck"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "problems: 20, wrong: 0" in result.stdout
