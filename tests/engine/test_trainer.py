"""One optimizer step: accumulation, clipping, mixed precision, and the finite check."""

import json

import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils import comm

from co_detr.engine import trainer
from co_detr.engine.train import run_training
from co_detr.errors import ConfigError
from tests.device import NAME
from tests.engine.tiny_detector import TinyDetector


def _train(cfg):
    torch.manual_seed(0)
    run_training(cfg, resume=False)
    return _weights_of(cfg)


def _weights_of(cfg):
    return torch.load(f"{cfg.train.output_dir}/model_final.pth")["model"]


def _lines(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("model", ["TinyDetector", "CountingDetector"])
def test_accumulation_equals_one_large_batch(tiny_cfg, tmp_path, model):
    """Whether losses are means over images or divided by the number of objects."""
    # In float64 the two ways of summing agree to rounding.
    common = [
        "optimizer.lr=1e-3",
        "train.max_iter=3",
        f"model._target_=tests.engine.tiny_detector.{model}",
    ]
    torch.set_default_dtype(torch.float64)
    try:
        whole = _train(tiny_cfg(*common, output="whole"))
        parts = _train(tiny_cfg(*common, "train.images_per_gpu=2", output="parts"))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=1e-9)
    # Adam would not notice gradients that are twice as long.
    for key in ("total_loss", "grad_norm"):
        whole, parts = (
            [line[key] for line in _lines(tmp_path / name) if key in line]
            for name in ("whole", "parts")
        )
        assert whole == pytest.approx(parts, rel=1e-6), key


class _Comm:
    """Detectron2's module, but for the rank."""

    def __init__(self, rank):
        self.rank = rank

    def get_rank(self):
        return self.rank

    def __getattr__(self, name):
        return getattr(comm, name)


def test_every_process_iteration_and_micro_batch_draws_its_own_numbers(tiny_cfg, monkeypatch):
    """Otherwise all of them would have the same noise, samples and dropout."""
    draws = []
    forward = TinyDetector.forward

    def drawing(self, batch):
        if self.training:
            draws.append(float(torch.rand((), dtype=torch.float64)))
        return forward(self, batch)

    monkeypatch.setattr(TinyDetector, "forward", drawing)
    by_rank = []
    for rank in (0, 1, 0):
        monkeypatch.setattr(trainer, "comm", _Comm(rank))
        draws.clear()
        run_training(tiny_cfg("train.images_per_gpu=2", output=str(len(by_rank))), resume=False)
        by_rank.append(list(draws))
    assert len(by_rank[0]) == 6 * 2  # iterations, micro-batches
    assert len(set(by_rank[0] + by_rank[1])) == 2 * 6 * 2
    assert by_rank[2] == by_rank[0]


def test_gradient_is_clipped_to_the_norm(tiny_cfg):
    """With SGD, the step is the learning rate times the clipped gradient."""
    cfg = tiny_cfg("train.max_iter=1", "train.clip_grad.max_norm=0.01")
    cfg.optimizer = {
        "_target_": torch.optim.SGD,
        "params": cfg.optimizer.params,
        "lr": 1.0,
    }
    cfg.optimizer.params.lr_factor_func.factor = 1.0
    torch.manual_seed(0)
    before = instantiate(cfg.model).state_dict()
    after = _train(cfg)
    step = torch.cat([(after[name] - before[name]).flatten() for name in before])
    assert step.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_no_clipping_without_a_limit(tiny_cfg, tmp_path):
    run_training(tiny_cfg("train.max_iter=1", "train.clip_grad.max_norm=null"), resume=False)
    assert _lines(tmp_path / "out")[0]["grad_norm"] > 0.1


@pytest.mark.skipif(NAME == "emulated", reason="its autocast changes nothing")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_steps(tiny_cfg, tmp_path, dtype):
    amp = ["train.amp.enabled=true", f"train.amp.dtype={dtype}", "train.max_iter=4"]
    with_amp = _train(tiny_cfg(*amp, output="amp"))
    without = _train(tiny_cfg("train.max_iter=4", output="full"))
    differences = []
    for name, value in without.items():
        assert with_amp[name].dtype == torch.float32
        torch.testing.assert_close(with_amp[name], value, rtol=0.2, atol=0.02)
        differences.append((with_amp[name] - value).abs().max())
    assert max(differences) > 0  # autocast was on


def test_float16_resumes_with_its_loss_scale(tiny_cfg, tmp_path):
    amp = ["train.amp.enabled=true", "train.amp.dtype=float16"]
    whole = _train(tiny_cfg(*amp, output="whole"))
    torch.manual_seed(0)
    run_training(tiny_cfg(*amp, "train.max_iter=3", output="parts"), resume=False)
    scale = torch.load(tmp_path / "parts" / "model_final.pth")["trainer"]["grad_scaler"]["scale"]
    assert scale > 1
    parts = tiny_cfg(*amp, output="parts")
    run_training(parts, resume=True)
    for name, value in _weights_of(parts).items():
        assert torch.equal(value, whole[name]), name


def test_learning_rates_by_name_and_progress(tiny_cfg, tmp_path):
    run_training(tiny_cfg("optimizer.lr=1e-3", "lr_multiplier.drops=[0.5]"), resume=False)
    optimizer = torch.load(tmp_path / "out" / "model_final.pth")["trainer"]["optimizer"]
    rates = sorted(group["initial_lr"] for group in optimizer["param_groups"])
    assert rates == pytest.approx([1e-4, 1e-3])
    logged = [line["lr"] for line in _lines(tmp_path / "out") if "lr" in line]
    assert logged == pytest.approx([logged[0]] * 3 + [logged[0] / 10] * 3)


@pytest.mark.parametrize("override", ["optimizer.lr=-1", "optimizer.betas=[2,3]"])
def test_settings_that_the_optimizer_refuses(tiny_cfg, override):
    with pytest.raises(ConfigError, match=r"^the optimizer refuses .*Invalid .*correct optimizer"):
        run_training(tiny_cfg(override), resume=False)
