"""tools/ablate.py from end to end, with a tiny detector."""

import importlib.util
import json
import signal
from pathlib import Path

import pytest

from tests.ablation.test_runner import kill_this_process_when
from tests.engine.tiny_data import make_tiny_data
from tests.paths import config_path, python_path

ROOT = Path(__file__).resolve().parents[2]
ENGINE_TESTS = ROOT / "tests" / "engine"


@pytest.fixture(scope="module")
def ablate():
    """`main` of tools/ablate.py."""
    spec = importlib.util.spec_from_file_location("ablate", ROOT / "tools" / "ablate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a grid of two variants, of which the second has no val set."""
    data = make_tiny_data(tmp_path)
    monkeypatch.setenv("PYTHONPATH", python_path())
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        f"config: {ENGINE_TESTS / 'tiny_config.py'}\n"
        "overrides: [train.checkpointer.period=1, train.checkpointer.max_to_keep=1]\n"
        "variants:\n"
        "  - name: Long\n"
        "    overrides: [train.max_iter=200, train.eval_period=100]\n"
        f"  - {{name: Broken, overrides: [data.val={tmp_path}/none.json]}}\n"
    )
    overrides = data.overrides(tmp_path)[:-1]
    return ["--grid", str(grid), "--output-dir", str(tmp_path / "out"), *overrides]


def test_interrupted_and_continued_beside_a_failure(
    ablate, arguments, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "out" / "long" / "seed0"
    # Of the checkpoints one is kept at a time, for milliseconds: any from the fifth on will do.
    watcher = kill_this_process_when(
        lambda: any(path.name >= "model_0000004.pth" for path in folder.glob("model_0*.pth"))
    )
    assert ablate([*arguments, "--threads-per-job", "1"]) == 128 + signal.SIGTERM
    watcher.join()
    record = json.loads((folder / "ablation_run.json").read_text())
    stopped = record["attempts"][0]["end"]
    assert stopped["exit_code"] == 0 and 5 <= stopped["iterations"] < 200

    assert ablate([*arguments, "--jobs", "2", "--threads-per-job", "1"]) == 1
    said = capsys.readouterr()
    assert "error: Broken, seed 0: " in said.err and "none.json" in said.err
    assert "Missing: Broken, seed 0: failed: " in said.out
    assert sorted(json.loads((folder / "evaluations.json").read_text())) == ["100", "200"]
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in log if "total_loss" in line] == list(range(200))

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    run = results["runs"][0]
    assert (run["state"], run["attempts"], run["iterations"]) == ("finished", 2, 200)
    assert run["AP"] is not None and run["cpu_seconds"] > stopped["cpu_seconds"] > 0.5
    assert "1 thread(s) each" in results["environment"][0]


def test_list_and_table_without_runs(ablate, arguments, tmp_path: Path, capsys) -> None:
    assert ablate([*arguments, "--table-only"]) == 2
    assert "there are no runs yet" in capsys.readouterr().err
    assert ablate([*arguments, "--list"]) == 0
    assert capsys.readouterr().out.split("\n")[0] == "  1  Long, seed 0: to do"
    assert not (tmp_path / "out").exists()
    assert ablate([*arguments, "--budget-hours", "0"]) == 0
    assert "2 runs are not finished" in capsys.readouterr().err
    assert ablate([*arguments, "--table-only"]) == 0
    assert "0 of 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "1"], "--seeds combines with --config-file"),
        (["--heads", "roi"], "--heads combines with --config-file"),
        (["--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--budget-hours", "-1"], "at least 0"),
        (["train.max_itr=1"], "did you mean train.max_iter"),
    ],
)
def test_mistakes(ablate, arguments, capsys, flags: list[str], message: str) -> None:
    assert ablate([*arguments, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(ablate, arguments, tmp_path: Path, capsys) -> None:
    (tmp_path / "out").write_text("a file")
    assert ablate(arguments) == 2
    assert "cannot be read or written" in capsys.readouterr().err


def test_combinations_on_the_command_line(ablate, tmp_path: Path, capsys) -> None:
    flags = ["--heads", "none", "atss", "--positive-queries", "on", "off", "--seeds", "0", "1"]
    config = config_path("co_detr_small")
    output = ["--output-dir", str(tmp_path / "out"), "--list", "train.max_iter=5"]
    assert ablate(["--config-file", config, *flags, *output]) == 0
    lines = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        f"{name}, seed {seed}: to do"
        for seed in (0, 1)
        for name in ("K=0", "K=1 atss, queries on", "K=1 atss, queries off")
    ]
