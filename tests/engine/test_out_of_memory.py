"""A failed allocation becomes one sentence with the switches that are not on yet."""

from types import SimpleNamespace

import pytest
import torch

from co_detr.data.loader import BatchPlan
from co_detr.engine.config import load_config
from co_detr.engine.memory_use import PeakMemory, training_advice
from co_detr.engine.train import run_evaluation_only, run_training
from co_detr.errors import OutOfMemoryError
from tests.paths import config_path

CPU = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 1000 bytes. Error code 12 (Cannot allocate memory)"
)
FAILURES = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(CPU),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


def _fail(monkeypatch, error, in_training=True):
    def forward(self, batched_inputs):
        assert self.training == in_training
        raise error

    monkeypatch.setattr("tests.engine.tiny_detector.TinyDetector.forward", forward)


@pytest.mark.parametrize("failure", FAILURES, ids=["cuda", "cpu", "cublas", "python"])
def test_training_names_what_would_help(tiny_cfg, monkeypatch, failure):
    _fail(monkeypatch, failure)
    with pytest.raises(OutOfMemoryError) as caught:
        run_training(tiny_cfg(), resume=False)
    message = caught.value.sentence
    assert message.startswith("the memory of the machine ran out in training (peak: ")
    assert "set train.images_per_gpu=2 (now 4; " in message
    assert "train.amp.enabled=true" in message
    assert "dataloader.train.mapper.augmentations.max_size is 1333" in message
    assert "activation_checkpointing" not in message  # this model has no such switch
    assert caught.value.__cause__ is failure


def test_what_is_on_already_is_not_advised(tiny_cfg, monkeypatch):
    _fail(monkeypatch, FAILURES[0])
    with pytest.raises(OutOfMemoryError) as caught:
        run_training(tiny_cfg("train.images_per_gpu=1", "train.amp.enabled=true"), resume=False)
    message = caught.value.sentence
    assert "images_per_gpu" not in message and "amp" not in message
    assert "choose smaller images" in message


@pytest.mark.parametrize(
    "name", ["co_detr_r50", "co_deformable_detr_swin_t_12ep", "co_dino_r50_lsj_12ep"]
)
def test_checkpointing_is_advised_where_it_is_off(name):
    switches = [
        f"model.{part}.activation_checkpointing" for part in ("encoder", "backbone.bottom_up")
    ]
    cfg = load_config(config_path(name), [f"{switches[1]}=true"])
    advice = training_advice(cfg, BatchPlan(100, 16, seed=0))
    assert f"{switches[0]}=true" in advice and switches[1] not in advice
    assert ("model.padding.square_size is 1" in advice) == ("lsj" in name)


def test_fewer_masks_are_advised_where_there_are_some():
    plan = BatchPlan(100, 16, seed=0)
    advice = training_advice(load_config(config_path("co_detr_r50_instance")), plan)
    assert "set model.mask_head.sampler.max_positives=64" in advice
    assert "mask" not in training_advice(load_config(config_path("co_detr_r50")), plan)


def test_evaluation_is_explained_too(tiny_cfg, monkeypatch):
    _fail(monkeypatch, FAILURES[0], in_training=False)
    with pytest.raises(OutOfMemoryError) as caught:
        run_evaluation_only(tiny_cfg("dataloader.test.batch_size=2"), resume=False)
    message = caught.value.sentence
    assert "ran out in evaluation" in message and "set dataloader.test.batch_size=1" in message
    assert "dataloader.test.mapper.augmentations.max_size is 1333" in message


def test_other_errors_pass(tiny_cfg, monkeypatch):
    _fail(monkeypatch, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_training(tiny_cfg(), resume=False)


def test_peak_memory_of_a_gpu_is_what_is_reserved_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda device: 3 * 2**30)
    properties = SimpleNamespace(total_memory=8 * 2**30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    assert str(PeakMemory.of("cuda:0")) == "3.00 of 8.00 GiB"


def test_peak_memory_of_the_cpu():
    peak = PeakMemory.of("cpu")
    assert 2**25 < peak.used < peak.total
