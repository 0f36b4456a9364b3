"""Switches for speed and repeatability reach PyTorch, and nothing else in the process."""

import logging
import os

import pytest
import torch
from omegaconf import OmegaConf

import co_detr
from co_detr.engine.setup import (
    configure_torch,
    cuda_settings,
    pin_for,
    setup_run,
    warn_of_emulation,
)
from co_detr.engine.train import run_training

pytestmark = pytest.mark.cpu_only("PyTorch's switches, which need no device")


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Puts everything back."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def _state():
    backends = torch.backends
    return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_and_cudnn(tiny_cfg, tf32):
    cfg = tiny_cfg(f"train.cuda.tf32={tf32}", "train.cuda.cudnn_benchmark=true")
    before = _state()
    configure_torch(cfg.train)  # on the CPU
    assert _state() == before
    cfg.train.device = "cuda"
    configure_torch(cfg.train)
    assert _state() == (tf32, tf32, True)


def test_a_config_of_an_earlier_version_changes_nothing(tiny_cfg):
    train = tiny_cfg("train.device=cuda").train
    del train.cuda, train.deterministic
    before = _state()
    configure_torch(train)
    with cuda_settings(train, torch.device("cuda")):
        assert _state() == before
    assert not torch.are_deterministic_algorithms_enabled()


def test_settings_of_a_predictor_end_with_its_call(tiny_cfg):
    train = tiny_cfg("train.cuda.cudnn_benchmark=true").train
    before = _state()
    with pytest.raises(KeyError):
        with cuda_settings(train, torch.device("cuda")):
            assert _state() == (True, True, True) != before
            raise KeyError
    assert _state() == before


def test_deterministic_kernels(tiny_cfg, tmp_path):
    run_training(tiny_cfg("train.max_iter=1"), resume=False)
    assert not torch.are_deterministic_algorithms_enabled()
    run_training(tiny_cfg("train.max_iter=1", "train.deterministic=true"), resume=False)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_loaders_pin_memory_for_a_gpu(tiny_cfg, monkeypatch):
    pinned = []

    def note(loader, device):
        pinned.append((loader, device))
        return pin_for(loader, device)

    for module in ("train", "validation"):
        monkeypatch.setattr(f"co_detr.engine.{module}.pin_for", note)
    run_training(tiny_cfg("train.max_iter=1", "train.val_loss.enabled=true"), resume=False)
    assert [device for _, device in pinned] == ["cpu"] * 3  # training, evaluation, its losses
    assert not any(loader.pin_memory for loader, _ in pinned)
    assert all(pin_for(loader, "cuda:0").pin_memory for loader, _ in pinned)


def test_the_predictor_runs_with_the_settings_of_its_config(monkeypatch):
    seen = []

    class Model:
        def __call__(self, inputs):
            seen.append(_state())
            return []

    predictor = co_detr.Predictor.__new__(co_detr.Predictor)
    predictor.model, predictor.device, predictor.amp = Model(), torch.device("cuda"), None
    predictor._plan = None
    predictor._train = OmegaConf.create({"cuda": {"tf32": True, "cudnn_benchmark": True}})
    before = _state()
    predictor._detect([])
    assert seen == [(True, True, True)] and _state() == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_type_that_the_cpu_has_to_emulate_is_told(monkeypatch, caplog, dtype):
    name = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}[dtype]
    monkeypatch.setattr(logging.getLogger("co_detr"), "propagate", True)  # off after a run

    def warnings(supported, device="cpu"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: supported, raising=False)
        caplog.clear()
        warn_of_emulation(device, dtype, "leave it out")
        return [record.getMessage() for record in caplog.records]

    [warning] = warnings(False)
    assert f"no instructions for {dtype}" in warning and warning.endswith("leave it out.")
    assert not warnings(True) and not warnings(False, "cuda")


def test_a_run_looks_at_its_precision(tiny_cfg, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "co_detr.engine.setup.warn_of_emulation", lambda *given: asked.append(given)
    )
    setup_run(tiny_cfg())
    assert not asked
    setup_run(tiny_cfg("train.amp.enabled=true"))
    assert asked == [("cpu", "bfloat16", "train.amp.enabled=false")]
