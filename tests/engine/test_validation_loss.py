"""The losses on the val set, and that the training does not notice them."""

import json

import pytest
import torch
from detectron2.config import instantiate
from torch import nn

from co_detr.engine.train import run_training
from co_detr.engine.trainer import StepSettings
from co_detr.engine.validation import ValidationLoss
from co_detr.errors import ConfigError
from tests.device import DEVICE, NAME

ON = ["train.val_loss.enabled=true", "train.eval_period=2"]


def _lines(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def _val_losses(output_dir):
    return {
        line["iteration"]: {key: line[key] for key in line if key.startswith("val_loss/")}
        for line in _lines(output_dir)
        if "val_loss/total" in line
    }


def test_the_training_is_the_same_with_it_and_without(tiny_cfg, tmp_path):
    states = []
    for name, switch in (("off", "false"), ("on", "true")):
        torch.manual_seed(0)
        overrides = ["model.dropout=0.3", "train.eval_period=2", f"train.val_loss.enabled={switch}"]
        run_training(tiny_cfg(*overrides, output=name), resume=False)
        states.append(torch.load(tmp_path / name / "model_final.pth"))
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    off, on = (
        [
            [line[key] for key in ("total_loss", "grad_norm")]
            for line in _lines(tmp_path / name)
            if "total_loss" in line
        ]
        for name in ("off", "on")
    )
    assert off == on
    losses = _val_losses(tmp_path / "on")
    assert sorted(losses) == [1, 3, 6]
    assert losses[6].keys() == {
        "val_loss/matching.loss_cls",
        "val_loss/roi.loss_bbox",
        "val_loss/total",
    }
    assert losses[6]["val_loss/total"] < losses[1]["val_loss/total"]
    assert not _val_losses(tmp_path / "off")


def test_it_is_the_mean_over_the_val_images(tiny_cfg, tiny_data, tmp_path):
    """Also where the val set numbers its classes in another order."""
    run_training(tiny_cfg("train.max_iter=1", *ON), resume=False)
    (expected,) = _val_losses(tmp_path / "out").values()

    cfg = tiny_cfg()
    model = instantiate(cfg.model)
    model.load_state_dict(torch.load(tmp_path / "out" / "model_final.pth")["model"])
    mapper = instantiate(cfg.dataloader.test.mapper)
    mapper.is_train = True
    records = instantiate(cfg.dataloader.train.dataset)
    with torch.no_grad():
        losses = [float(sum(model([mapper(record)]).values())) for record in records]
    assert expected["val_loss/total"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)

    path = tiny_data.root / "val.json"
    content = json.loads(path.read_text())
    other = {3: 9, 7: 2}
    for category in content["categories"]:
        category["id"] = other[category["id"]]
    for annotation in content["annotations"]:
        annotation["category_id"] = other[annotation["category_id"]]
    path.write_text(json.dumps(content))
    start = f"train.init_checkpoint={tmp_path / 'out' / 'model_final.pth'}"
    again = tiny_cfg(start, "optimizer.lr=0", "train.max_iter=1", *ON, output="again")
    run_training(again, resume=False)
    (found,) = _val_losses(tmp_path / "again").values()
    assert found == pytest.approx(expected, rel=1e-5)


class Noisy(nn.Module):
    """Draws random numbers, gathers statistics and drops: all that could leave a trace."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, batch):
        assert self.training and not self.dropout.training and not torch.is_grad_enabled()
        x = self.dropout(self.norm(torch.ones(4, 2) + torch.rand(())))
        return {"loss": x.sum()}


def test_nothing_is_left_behind(tiny_cfg):
    cfg = tiny_cfg()
    records = instantiate(cfg.dataloader.test.dataset)
    measure = ValidationLoss(
        records, instantiate(cfg.dataloader.test.mapper), StepSettings(NAME, seed=0)
    )
    model = Noisy().to(DEVICE).eval()
    model.norm.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    first = measure(model)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == [False, True, False, False]
    assert measure(model) == first  # its own draws are the same each time


def test_a_part_of_the_val_set(tiny_cfg, tmp_path, monkeypatch):
    passes = []
    forward = ValidationLoss.__call__

    def counted(self, model):
        passes.append(self.num_images)
        return forward(self, model)

    monkeypatch.setattr(ValidationLoss, "__call__", counted)
    run_training(tiny_cfg("train.max_iter=1", "train.val_loss.max_images=3", *ON), resume=False)
    assert passes == [3]
    with pytest.raises(ConfigError, match="max_images=0 must be"):
        run_training(tiny_cfg("train.val_loss.max_images=0", *ON), resume=False)


def test_it_can_choose_the_best_checkpoint(tiny_cfg, tmp_path):
    run_training(tiny_cfg(*ON, "train.best_metric=val_loss/total"), resume=False)
    losses = {
        key: metrics["val_loss/total"] for key, metrics in _val_losses(tmp_path / "out").items()
    }
    best = torch.load(tmp_path / "out" / "model_best.pth")["iteration"]
    assert best == min(min(losses, key=losses.get), 5)
