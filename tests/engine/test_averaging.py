"""The average of the weights: its rule, that a resume continues it, and who uses it."""

import math

import pytest
import torch
from detectron2.config import instantiate

from co_detr.engine.hooks import AveragedWeights, EmaSettings
from co_detr.engine.train import run_evaluation_only, run_training
from co_detr.errors import ConfigError
from tests.device import DEVICE

EMA = ["train.ema.enabled=true", "train.ema.decay=0.5", "train.ema.warmup_iterations=3"]


def _train(cfg, resume=False):
    torch.manual_seed(0)
    run_training(cfg, resume=resume)
    return torch.load(f"{cfg.train.output_dir}/model_final.pth")


def _averaged(checkpoint):
    return {
        key.removeprefix("module."): value
        for key, value in checkpoint["ema"].items()
        if key.startswith("module.")
    }


def _assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_the_average_follows_its_rule(tiny_cfg, tmp_path):
    cfg = tiny_cfg(*EMA, "train.checkpointer.period=1", "train.checkpointer.max_to_keep=9")
    final = _train(cfg)
    steps = [torch.load(tmp_path / "out" / f"model_{i:07d}.pth")["model"] for i in range(6)]
    for name, value in _averaged(final).items():
        expected = steps[0][name]
        for number, step in enumerate(steps[1:], start=1):
            decay = 0.5 * (1 - math.exp(-number / 3))
            expected = decay * expected + (1 - decay) * step[name]
        torch.testing.assert_close(value, expected)
    assert final["ema"]["n_averaged"] == 6


def test_training_itself_stays_the_same(tiny_cfg):
    plain, with_ema = _train(tiny_cfg(output="plain")), _train(tiny_cfg(*EMA, output="ema"))
    assert "ema" not in plain
    _assert_equal(with_ema["model"], plain["model"])


@pytest.mark.parametrize(
    "extra",
    [["train.images_per_gpu=2"], ["train.amp.enabled=true", "train.amp.dtype=float16"]],
    ids=["accumulation", "float16"],
)
def test_resume_continues_the_average(tiny_cfg, tmp_path, extra):
    whole = _train(tiny_cfg(*EMA, *extra, output="whole"))
    _train(tiny_cfg(*EMA, *extra, "train.max_iter=3", output="parts"))
    parts = _train(tiny_cfg(*EMA, *extra, output="parts"), resume=True)
    _assert_equal(parts["ema"], whole["ema"])
    _assert_equal(parts["model"], whole["model"])
    assert (tmp_path / "parts" / "metrics.json").read_text() == (
        tmp_path / "whole" / "metrics.json"
    ).read_text()


def test_an_average_can_start_late(tiny_cfg, caplog):
    _train(tiny_cfg("train.max_iter=3"))
    final = _train(tiny_cfg(*EMA), resume=True)
    assert "has no averaged weights" in caplog.text
    assert final["ema"]["n_averaged"] == 3


def test_evaluation_uses_the_average_unless_told_otherwise(tiny_cfg, tmp_path, caplog):
    caplog.set_level("INFO")
    final = _train(tiny_cfg(*EMA, "optimizer.lr=0.05"))
    detections = _detections(tmp_path / "out")
    path = tmp_path / "out" / "model_final.pth"
    results = {}
    for weights in ("ema", "raw"):
        caplog.clear()
        overrides = [f"train.init_checkpoint={path}", f"train.init_checkpoint_weights={weights}"]
        run_evaluation_only(tiny_cfg(*overrides, output=weights), resume=False)
        results[weights] = _detections(tmp_path / weights)
        assert f"its {'averaged' if weights == 'ema' else 'raw'} weights" in caplog.text
    assert results["ema"] == detections != results["raw"]
    # The same from the last checkpoint, and from a file with the average alone.
    run_evaluation_only(tiny_cfg(), resume=True)
    assert _detections(tmp_path / "out") == detections
    torch.save({"model": _averaged(final)}, tmp_path / "alone.pth")
    alone = f"train.init_checkpoint={tmp_path / 'alone.pth'}"
    run_evaluation_only(tiny_cfg(alone, output="alone"), resume=False)
    assert _detections(tmp_path / "alone") == detections


def _detections(output_dir):
    return (output_dir / "coco_instances_results.json").read_text()


def test_fine_tuning_starts_from_the_average(tiny_cfg, tmp_path):
    final = _train(tiny_cfg(*EMA))
    start = f"train.init_checkpoint={tmp_path / 'out' / 'model_final.pth'}"
    tuned = _train(tiny_cfg(start, "optimizer.lr=0", "train.max_iter=1", output="tuned"))
    _assert_equal(tuned["model"], _averaged(final))


def test_a_finished_run_evaluates_its_average(tiny_cfg, tmp_path):
    _train(tiny_cfg(*EMA, "optimizer.lr=0.05"))
    detections = _detections(tmp_path / "out")
    run_training(tiny_cfg(*EMA), resume=True)
    assert _detections(tmp_path / "out") == detections


def test_a_finished_run_without_an_average_evaluates_its_weights(tiny_cfg, tmp_path):
    _train(tiny_cfg("optimizer.lr=0.05"))
    detections = _detections(tmp_path / "out")
    run_training(tiny_cfg(*EMA), resume=True)
    assert _detections(tmp_path / "out") == detections


def test_buffers_are_copied():
    model = torch.nn.BatchNorm1d(2).to(DEVICE)
    averaged = AveragedWeights(model, EmaSettings(enabled=True, decay=0.9))
    for _ in range(2):
        model(torch.randn(8, 2))
        averaged.update_parameters(model)
    assert torch.equal(averaged.module.running_mean, model.running_mean)
    assert not averaged.module.training and not averaged.module.weight.requires_grad


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.ema.decay=1.0", "train.ema.decay=1.0 must be"),
        ("train.ema.warmup_iterations=-1", "train.ema.warmup_iterations=-1 must be"),
        ("train.init_checkpoint_weights=mean", 'must be "ema" or "raw"'),
    ],
)
def test_wrong_settings(tiny_cfg, override, message, tmp_path):
    model = instantiate(tiny_cfg().model)
    torch.save({"model": model.state_dict()}, tmp_path / "init.pth")
    with pytest.raises(ConfigError, match=message):
        run_training(
            tiny_cfg(override, f"train.init_checkpoint={tmp_path / 'init.pth'}"), resume=False
        )


def test_an_average_that_is_switched_off_is_dropped_with_a_word(tiny_cfg, tmp_path, caplog):
    run_training(tiny_cfg("train.ema.enabled=true", "train.max_iter=3"), resume=False)
    run_training(tiny_cfg("train.max_iter=4"), resume=True)
    assert "The averaged weights of" in caplog.text and "are dropped" in caplog.text
    assert "ema" not in torch.load(tmp_path / "out" / "model_final.pth")
