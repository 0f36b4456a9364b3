"""The best checkpoint and the early stop, with metrics that a test prescribes."""

import json

import pytest
import torch

from co_detr.engine.train import run_training
from co_detr.engine.validation import evaluations_without_gain
from co_detr.errors import CheckpointError, ConfigError

EVERY_STEP = ["train.eval_period=1", "train.checkpointer.period=1"]


@pytest.fixture
def prescribe(monkeypatch):
    """Makes evaluations give these APs, one after the other; returns the list of what is left."""

    def make(*values):
        left = list(values)

        def evaluate(model, loader, evaluator, output_dir, should_stop=None):
            value = left.pop(0)
            return {} if value is None else {"AP": value, "AP50": -value}

        monkeypatch.setattr("co_detr.engine.train.evaluate", evaluate)
        return left

    return make


def _load(output_dir, name):
    return torch.load(output_dir / f"{name}.pth")


def _same_weights(first, second):
    return all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())


def test_the_best_checkpoint_is_kept_beside_the_others(tiny_cfg, tmp_path, prescribe):
    prescribe(10.0, 30.0, 20.0, 30.0, 5.0, 1.0)
    run_training(tiny_cfg(*EVERY_STEP), resume=False)
    out = tmp_path / "out"
    best = _load(out, "model_best")
    assert best["iteration"] == 1 and best["class_names"] == ["cell", "plate"]
    assert _same_weights(best, _load(out, "model_0000001"))
    assert not _same_weights(best, _load(out, "model_final"))
    # A resumed run goes on from the last one, not from the best one.
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    assert json.loads((out / "evaluations.json").read_text())["2"] == {"AP": 30.0, "AP50": -30.0}


def test_other_metrics_and_undefined_ones(tiny_cfg, tmp_path, prescribe, caplog):
    prescribe(10.0, None, 30.0)
    run_training(tiny_cfg(*EVERY_STEP, "train.best_metric=AP50", "train.max_iter=3"), resume=False)
    assert _load(tmp_path / "out", "model_best")["iteration"] == 0
    assert "AP50 is undefined in this evaluation" in caplog.text


COMPARING = ("model._target_=tests.engine.tiny_detector.ComparingDetector", "dataloader.tta=flip")


@pytest.mark.parametrize("metric", ["roi/AP50", "tta/AP-cell"])
def test_metrics_of_other_detections(tiny_cfg, tmp_path, metric):
    settings = (f"train.best_metric={metric}", "train.max_iter=1", *COMPARING)
    run_training(tiny_cfg(*settings), resume=False)
    assert metric in json.loads((tmp_path / "out" / "evaluations.json").read_text())["1"]
    assert _load(tmp_path / "out", "model_best")["iteration"] == 0


def test_a_resumed_run_remembers_its_best(tiny_cfg, tmp_path, prescribe):
    prescribe(10.0, 30.0, 20.0, 25.0, 28.0, 29.0)
    run_training(tiny_cfg(*EVERY_STEP, "train.max_iter=3"), resume=False)
    run_training(tiny_cfg(*EVERY_STEP), resume=True)
    assert _load(tmp_path / "out", "model_best")["iteration"] == 1
    # A new run in the same folder does not.
    prescribe(5.0)
    run_training(tiny_cfg("train.max_iter=1"), resume=False)
    assert _load(tmp_path / "out", "model_best")["iteration"] == 0
    assert json.loads((tmp_path / "out" / "evaluations.json").read_text()).keys() == {"1"}


def test_no_best_checkpoint_without_a_metric(tiny_cfg, tmp_path):
    run_training(tiny_cfg("train.best_metric=null", "train.max_iter=1"), resume=False)
    assert not (tmp_path / "out" / "model_best.pth").exists()
    assert not (tmp_path / "out" / "evaluations.json").exists()


STOPPING = [*EVERY_STEP, "train.early_stop.patience=2", "train.early_stop.min_delta=1.0"]


def test_early_stop(tiny_cfg, tmp_path, prescribe, caplog):
    caplog.set_level("INFO")
    left = prescribe(10.0, 20.0, 20.9, 15.0, 99.0, 99.0)
    metrics = run_training(tiny_cfg(*STOPPING), resume=False)
    assert metrics["AP"] == 15.0 and left == [99.0, 99.0]
    assert "Early stop after 4 steps: AP has not gained in 2 evaluations." in caplog.text
    out = tmp_path / "out"
    final = _load(out, "model_final")
    assert final["iteration"] == 3 and _same_weights(final, _load(out, "model_0000003"))
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["bbox/AP"] for line in lines if "bbox/AP" in line] == [10.0, 20.0, 20.9, 15.0]

    # Resumed, it stays ended, and goes on if it is asked to.
    left = prescribe(15.0)
    assert run_training(tiny_cfg(*STOPPING), resume=True)["AP"] == 15.0
    assert _load(out, "model_final")["iteration"] == 3
    prescribe(40.0, 40.0)
    run_training(tiny_cfg(*STOPPING, "train.early_stop.patience=5"), resume=True)
    assert _load(out, "model_final")["iteration"] == 5


def test_patience_survives_a_resume(tiny_cfg, tmp_path, prescribe):
    left = prescribe(20.0, 10.0, 10.0, 99.0)
    # Stopped after two of six iterations, as if it had been killed.
    run_training(tiny_cfg(*STOPPING, "train.max_iter=2"), resume=False)
    run_training(tiny_cfg(*STOPPING), resume=True)
    assert left == [99.0]
    assert _load(tmp_path / "out", "model_final")["iteration"] == 2


@pytest.mark.parametrize(
    ("values", "min_delta", "waited"),
    [
        ([], 0, 0),
        ([1.0], 0, 0),
        ([1.0, 1.0, 2.0], 0, 0),
        ([1.0, 2.0, 2.0, 1.5], 0, 2),
        ([1.0, 1.4, 1.8, 2.2], 1.0, 0),  # slow gains add up
        ([-1.0, -2.0, -0.5, -0.6], 0, 1),
    ],
)
def test_evaluations_without_gain(values, min_delta, waited):
    assert evaluations_without_gain(values, min_delta) == waited


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.best_metric=mAP"], "train.best_metric=mAP is no metric .* choose AP, AP50"),
        (["train.best_metric=val_loss/total"], "is no metric of the evaluation"),
        (["train.best_metric=AP-dog"], "is no metric of the evaluation"),
        (["train.best_metric=tta/AP"], "tta/AP is no metric of the evaluation"),
        (["train.best_metric=roi/mAP", *COMPARING], "or roi/, tta/ before one of these"),
        (["train.best_metric=roi/segm/AP", *COMPARING], "is no metric of the evaluation"),
        (["train.early_stop.patience=0"], "train.early_stop.patience=0 must be"),
        (["train.early_stop.min_delta=-1"], "train.early_stop.min_delta=-1 must be"),
        (["train.best_metric=null", "train.early_stop.patience=1"], "set train.best_metric=AP"),
    ],
)
def test_wrong_settings(tiny_cfg, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run_training(tiny_cfg(*overrides), resume=False)
    assert not (tmp_path / "out").exists()


def test_a_damaged_history(tiny_cfg, tmp_path):
    run_training(tiny_cfg("train.max_iter=3"), resume=False)
    (tmp_path / "out" / "evaluations.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"evaluations\.json is no history .* remove it"):
        run_training(tiny_cfg(), resume=True)
