"""Rows of classes that a checkpoint lacks learn faster, and a resumed run still knows them."""

import logging

import pytest
import torch
from torch import nn

from co_detr.checkpoint.saving import Checkpointer
from co_detr.engine.optim import NewClassRate
from co_detr.engine.train import run_evaluation_only
from co_detr.engine.train import run_training as run_unseeded
from co_detr.errors import CheckpointError, ConfigError
from co_detr.structures import ClassRows
from tests.engine.tiny_detector import TinyDetector


class ClassyDetector(TinyDetector):
    """Its last layer has a row for each class, and says so."""

    class_layers = {"classify": ClassRows()}


def run_training(cfg, resume):
    torch.manual_seed(0)  # as train_net.py, for the first values of the new rows
    return run_unseeded(cfg, resume=resume)


SETTINGS = (
    "model._target_=tests.engine.test_new_classes.ClassyDetector",
    "train.init_checkpoint_mismatch=by_name",
    "train.new_class_rate=4.0",
    "train.ema.enabled=true",
)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_it_is_a_higher_learning_rate(kind):
    """Two layers of one row each, one of them at four times the rate, are one layer of two rows."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    parts = [
        [nn.Parameter(p.detach()[row : row + 1].clone()) for p in model.parameters()]
        for row in (0, 1)
    ]
    settings = {"lr": 0.01, "weight_decay": 0.1}
    optimizer = kind(model.parameters(), **settings)
    rate = NewClassRate(model, optimizer, 4.0)
    rate.load_state_dict({"rows": {"weight": [1], "bias": [1], "elsewhere": [0]}})
    groups = [{"params": parts[0]}, {"params": parts[1], "lr": 0.04}]
    expected = kind(groups, **settings)
    for _ in range(5):
        for tensor, *rows in zip(model.parameters(), *parts, strict=True):
            tensor.grad = torch.randn_like(tensor)
            for row, part in enumerate(rows):
                part.grad = tensor.grad[row : row + 1].clone()
        optimizer.step()
        expected.step()
    for tensor, *rows in zip(model.parameters(), *parts, strict=True):
        torch.testing.assert_close(tensor.detach(), torch.cat([row.detach() for row in rows]))


@pytest.fixture
def other(tmp_path) -> str:
    """A checkpoint of the classes plate and dog; the data has cell and plate."""
    torch.manual_seed(5)
    Checkpointer(ClassyDetector(2), str(tmp_path), class_names=["plate", "dog"]).save("other")
    return f"train.init_checkpoint={tmp_path / 'other.pth'}"


def final(folder):
    return torch.load(folder / "model_final.pth")


def test_a_run_and_its_resumption(tiny_cfg, tmp_path, other, caplog):
    caplog.set_level(logging.INFO, "co_detr")
    run_training(tiny_cfg(*SETTINGS, other, output="whole"), resume=False)
    assert "Rows of 1 new classes learn 4 times as fast: cell." in caplog.text
    run_training(tiny_cfg(*SETTINGS, other, "train.max_iter=3"), resume=False)
    run_training(tiny_cfg(*SETTINGS, other), resume=True)
    whole, resumed = final(tmp_path / "whole"), final(tmp_path / "out")
    assert whole["new_classes"] == {"rows": {"classify.weight": [0], "classify.bias": [0]}}
    for key, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][key]), key

    plain = [*SETTINGS[:2], SETTINGS[3], other, "train.max_iter=1"]
    start = torch.load(tmp_path / "other.pth")["model"]["classify.bias"]
    run_training(tiny_cfg(*plain, output="plain"), resume=False)
    run_training(tiny_cfg(*SETTINGS, other, "train.max_iter=1", output="fast"), resume=False)
    slow, fast = (final(tmp_path / name)["model"]["classify.bias"] for name in ("plain", "fast"))
    assert slow[1] == fast[1] != start[0]  # plate, which the file knows
    assert slow[0] != fast[0]


def test_a_run_that_did_not_know_them_cannot_go_on_with_them(tiny_cfg, other):
    plain = [*SETTINGS[:2], other, "train.max_iter=3"]
    run_training(tiny_cfg(*plain), resume=False)
    with pytest.raises(CheckpointError, match="has no new_classes, so that no training can go on"):
        run_training(tiny_cfg(*SETTINGS, other), resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_the_run_is_evaluated_as_it_was_trained(tiny_cfg, tmp_path, other, resume):
    """Its own checkpoints have its classes, whatever it was started from."""
    settings = [*SETTINGS, "train.init_checkpoint_classes={cell: dog}"]
    trained = run_training(tiny_cfg(*settings, other, "train.max_iter=1"), resume=False)
    own = f"train.init_checkpoint={tmp_path / 'out' / 'model_final.pth'}"
    assert run_evaluation_only(tiny_cfg(*settings, own), resume=resume) == trained


def test_nothing_is_new(tiny_cfg, tmp_path, other, caplog):
    caplog.set_level(logging.INFO, "co_detr")
    sources = "train.init_checkpoint_classes={cell: dog}"
    run_training(tiny_cfg(*SETTINGS, other, sources, "train.max_iter=1"), resume=False)
    assert "1 of them are of another name: cell from dog" in caplog.text
    assert "train.new_class_rate does nothing: what was loaded has rows" in caplog.text


def test_sources_without_class_heads_are_refused(tiny_cfg, tmp_path):
    sources = "train.init_checkpoint_classes={cell: dog}"
    with pytest.raises(ConfigError, match="but there is no checkpoint to start from: leave it out"):
        run_training(tiny_cfg(*SETTINGS, sources), resume=False)
    backbone = ClassyDetector(2).backbone.state_dict()
    torch.save({"model": {f"backbone.{k}": v for k, v in backbone.items()}}, tmp_path / "b.pth")
    start = f"train.init_checkpoint={tmp_path / 'b.pth'}"
    with pytest.raises(ConfigError, match=r"b\.pth holds a backbone alone: leave it out"):
        run_training(tiny_cfg(*SETTINGS, sources, start), resume=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.new_class_rate=0"], "new_class_rate=0 must be above 0"),
        (["train.new_class_rate=4"], "new_class_rate=4 is for classes that a checkpoint does not"),
        (["train.init_checkpoint_classes={a: b}"], "which only .*=by_name does: set that, too"),
    ],
)
def test_wrong_settings(tiny_cfg, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run_training(tiny_cfg(*overrides), resume=False)
