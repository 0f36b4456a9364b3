"""The two command-line tools of the quick start."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from co_detr.tools.draw import boxes

TOOLS = Path(__file__).parents[2] / "tools"
DIGITS = ["--train", "2", "--val", "1"]


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_make_digits_writes_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = load_tool("make_digits").main
    arguments = ["--out", str(tmp_path), *DIGITS]
    assert main(arguments) == 0
    assert "Wrote 2 train and 1 val images" in capsys.readouterr().out
    written = (tmp_path / "val.json").stat().st_mtime_ns
    assert main(arguments) == 0
    assert "is complete" in capsys.readouterr().out
    assert (tmp_path / "val.json").stat().st_mtime_ns == written
    assert main([*arguments, "--force"]) == 0
    assert (tmp_path / "val.json").stat().st_mtime_ns > written


def test_make_digits_reports_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = load_tool("make_digits").main
    assert main(["--out", str(tmp_path), "--train", "0"]) == 2
    assert "train must be at least 1 image, got 0." in capsys.readouterr().err
    (tmp_path / "train.json").write_text("{}")
    assert main(["--out", str(tmp_path), *DIGITS]) == 2
    assert "choose another folder with --out" in capsys.readouterr().err


def test_make_digits_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert load_tool("make_digits").main(["--out", str(tmp_path), *DIGITS]) == 2
    assert "pip install scikit-image scikit-learn" in capsys.readouterr().err


def test_plot_results_reads_the_saved_config(
    tmp_path: Path, make_run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "k2")
    make_run(tmp_path / "k0", parts=("matching",))
    main = load_tool("plot_results").main
    assert main([str(tmp_path / "k2"), "--compare", str(tmp_path / "k0")]) == 0
    printed = capsys.readouterr().out
    for name in ("training_curve.png", "predictions.png"):
        assert (tmp_path / "k2" / name).stat().st_size > 5000
        assert f"Wrote {tmp_path / 'k2' / name}" in printed


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("metrics.jsonl", "metrics.jsonl does not exist; train first"),
        ("config.yaml", "config.yaml does not exist; give --annotations and --images"),
        ("val.json", "val.json does not exist"),
        ("coco_instances_results.json", "results.json does not exist; evaluate first"),
    ],
)
def test_plot_results_names_what_is_missing(
    tmp_path: Path,
    make_run: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    removed: str,
    message: str,
) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / removed).unlink()
    assert load_tool("plot_results").main([str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["model: {}", "data: {val: 3}", "data: [", ""])
def test_plot_results_refuses_a_config_without_data(
    tmp_path: Path, make_run: Callable[..., None], capsys: pytest.CaptureFixture[str], text: str
) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(text)
    main = load_tool("plot_results").main
    assert main([str(tmp_path / "run")]) == 1
    assert "give --annotations and --images" in capsys.readouterr().err
    run = tmp_path / "run"
    paths = ["--annotations", str(run / "val.json"), "--images", str(run / "images")]
    assert main([str(run), *paths]) == 0


def test_plot_results_refuses_a_missing_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_tool("plot_results").main([str(tmp_path / "nothing")]) == 1
    assert "nothing is not a folder; give a run's output folder." in capsys.readouterr().err


def test_plot_results_reads_images_as_the_run_did(
    tmp_path: Path, make_run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    make_run(run)
    values = np.full((80, 60), 1000, np.uint16)
    values[:, :40] = 3000  # the right side of the stored image, the lower one of the upright image
    exif = Image.Exif()
    exif[274] = 8  # is turned to the left to be seen
    Image.fromarray(values).save(run / "images" / "a.png", exif=exif)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("data: {", "data: {value_range: [1000, 5000], "))
    shown = []
    draw = boxes.draw_boxes
    monkeypatch.setattr(boxes, "draw_boxes", lambda *args: shown.append(args[1]) or draw(*args))
    for paths in ([], ["--annotations", str(run / "val.json"), "--images", str(run / "images")]):
        shown.clear()
        assert load_tool("plot_results").main([str(run), *paths]) == 0
        assert shown[0].shape == (60, 80, 3)
        assert (shown[0][20:] == 128).all() and (shown[0][:20] == 0).all()
