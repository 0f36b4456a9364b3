"""Frozen parts have no gradient, decay, moments or drift, and compute as in evaluation."""

import copy

import pytest
import torch
from torch import nn

from co_detr.engine.freezing import freeze, keep_frozen_in_eval
from co_detr.engine.train import run_training
from co_detr.engine.validation import training_without_trace
from co_detr.errors import CheckpointError, ConfigError
from tests.engine.tiny_detector import TinyDetector

pytestmark = pytest.mark.cpu_only("what it tests is the same on any device")

FROZEN = 'train.freeze=["backbone"]'


def final(cfg):
    return torch.load(f"{cfg.train.output_dir}/model_final.pth")


def test_a_frozen_backbone_stays_what_it_is(tiny_cfg, tmp_path, caplog):
    caplog.set_level("INFO")
    run_training(tiny_cfg("train.max_iter=2", output="first"), resume=False)
    start = f"train.init_checkpoint={tmp_path / 'first' / 'model_final.pth'}"
    ema = ["train.ema.enabled=true", "train.ema.decay=0.7", "train.ema.warmup_iterations=0"]
    cfg = tiny_cfg(FROZEN, start, *ema, "optimizer.weight_decay=0.5", output="second")
    run_training(cfg, resume=False)
    first, second = final(tiny_cfg(output="first")), final(cfg)
    averaged = {name.removeprefix("module."): value for name, value in second["ema"].items()}
    for name, value in second["model"].items():
        is_frozen = name.startswith("backbone.")
        assert torch.equal(value, first["model"][name]) == is_frozen, name
        assert torch.equal(averaged[name], value) == is_frozen, name
    trained = second["trainer"]["optimizer_layout"]["parameters"]
    assert trained and not any(name.startswith("backbone.") for name in trained)
    assert len(second["trainer"]["optimizer"]["state"]) == len(trained)
    assert "parameters of backbone (0.0 M)" in caplog.text
    assert "Computing as in evaluation: backbone" in caplog.text


def test_a_resumed_run_freezes_the_same(tiny_cfg):
    run_training(tiny_cfg(FROZEN, "train.max_iter=3"), resume=False)
    run_training(tiny_cfg(FROZEN), resume=True)
    with pytest.raises(CheckpointError, match="backbone.stem.weight is new; 4 new, 0 gone"):
        run_training(tiny_cfg("train.max_iter=9"), resume=True)
    with pytest.raises(CheckpointError, match=r"classify.bias is not trained any more; 0 new, 1 g"):
        run_training(
            tiny_cfg('train.freeze=["backbone","*fy.bias"]', "train.max_iter=9"), resume=True
        )


def body_and_head():
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    return nn.ModuleDict({"body": nn.ModuleDict({"block": block}), "head": nn.BatchNorm2d(4)})


def modes(model):
    return {name: module.training for name, module in model.named_modules() if name}


def test_frozen_layers_compute_as_in_evaluation():
    model = body_and_head()
    frozen = freeze(model, ["body.*"])
    assert frozen.parts == ("body",) and frozen.counts == {"body.*": 24} and frozen.trained == 8
    for kept in (model, copy.deepcopy(model)):  # as of the average
        with training_without_trace(kept, torch.device("cpu")):
            assert modes(kept)["head"] is False  # norms keep their statistics there anyway
            assert not modes(kept)["body.block.2"]
        keep_frozen_in_eval(kept.train())
        assert {name for name, training in modes(kept).items() if training} == {"head"}
        images = torch.rand(2, 3, 5, 5)
        out = kept["body"]["block"](images)
        assert not out.requires_grad and torch.equal(out, kept["body"]["block"](images))


def test_parts_of_a_layer_can_be_frozen():
    model = body_and_head()
    frozen = freeze(model, ["*.weight", "body.block.1"])
    assert frozen.parts == ("body.block.1",)
    assert frozen.counts == {"*.weight": 20, "body.block.1": 4}
    left = [name for name, value in model.named_parameters() if value.requires_grad]
    assert left == ["body.block.0.bias", "head.bias"]


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (["bakbone.*"], "names 'bakbone.*', which is no parameter .* did you mean backbone"),
        (["x"], "the model consists of backbone, classify, locate"),
        (["*"], "leaves nothing to learn"),
    ],
)
def test_what_cannot_be_frozen(patterns, says):
    with pytest.raises(ConfigError, match=says):
        freeze(TinyDetector(2), patterns)
