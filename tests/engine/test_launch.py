"""Processes have devices of their own, wait as long as they are told, and do not wait in vain."""

import argparse
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm

from co_detr.engine import launch as launching
from co_detr.engine.setup import build_model
from co_detr.engine.train import run_training
from co_detr.errors import CheckpointError, ConfigError
from tests.engine.processes import job_of


def _errors(processes):
    said = "".join(process.output for process in processes)
    return [line for line in said.splitlines() if "error: " in line]


def tell_the_timeout():
    """Instead of training."""
    from co_detr.engine import train

    def tell(cfg, args):
        backend = comm._get_global_gloo_group()._get_backend(torch.device("cpu"))
        print(f"waits {backend.options._timeout}", flush=True)
        comm.synchronize()  # the first process to end takes the others' meeting point with it

    train.main = tell


def test_processes_wait_for_objects_as_long_as_they_are_told(two):
    ranks = two("train.process_timeout_minutes=7", prepare=tell_the_timeout)
    assert [process.wait() for process in ranks] == [0, 0], [process.output for process in ranks]
    assert all("waits 0:07:00" in process.output for process in ranks)


def test_beside_nccl_too(monkeypatch):
    made = []
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "new_group", lambda **settings: made.append(settings) or "group")
    monkeypatch.setattr(comm, "_get_global_gloo_group", comm._get_global_gloo_group)
    launching._share_patience(timedelta(minutes=7))
    assert comm._get_global_gloo_group() == "group"
    assert made == [{"backend": "gloo", "timeout": timedelta(minutes=7)}]


def fail_in_the_second_process():
    from tests.engine.tiny_detector import TinyDetector

    losses, calls = TinyDetector._losses, []

    def fail(self, *arguments):
        calls.append(None)
        if comm.get_rank() == 1 and len(calls) == 3:
            raise ValueError("a bug in one process")
        return losses(self, *arguments)

    TinyDetector._losses = fail


def fail_in_the_evaluation_of_the_main_process():
    from co_detr.engine.evaluators import CocoDetectionEvaluator

    def fail(self, *arguments, **others):
        raise TypeError("a bug in the evaluation")

    CocoDetectionEvaluator.judge = fail


@pytest.mark.parametrize(
    ("prepare", "guilty", "bug"),
    [
        (fail_in_the_second_process, 1, "ValueError: a bug in one process"),
        (fail_in_the_evaluation_of_the_main_process, 0, "TypeError: a bug in the evaluation"),
    ],
)
def test_an_unexpected_error_of_one_process_ends_the_others(two, prepare, guilty, bug):
    ranks = two("train.eval_period=2", prepare=prepare)
    assert ranks[guilty].wait() == 1 and bug in ranks[guilty].output
    assert ranks[1 - guilty].wait() == 2
    (error,) = _errors([ranks[1 - guilty]])
    assert "another process of this run is gone" in error
    assert "Traceback" not in ranks[1 - guilty].output


def forbid_the_history():
    from co_detr.engine.validation import EvaluationHistory

    def refuse(self, until):
        raise CheckpointError("evaluations.json is no history: remove it.")

    EvaluationHistory.read = refuse


def forbid_the_writers():
    from co_detr.engine import train

    def refuse(*arguments, **settings):
        raise ConfigError("MLflow cannot be used: check train.mlflow.tracking_uri.")

    train.build_trackers = refuse


@pytest.mark.parametrize("prepare", [forbid_the_history, forbid_the_writers])
def test_what_the_main_process_alone_finds_ends_all_with_one_sentence(two, tiny_cfg, prepare):
    run_training(tiny_cfg("train.max_iter=3"), resume=False)
    ranks = two("--resume", prepare=prepare)
    assert [process.wait() for process in ranks] == [2, 2], [process.output for process in ranks]
    (error,) = _errors(ranks)
    assert error.startswith("[rank 0] error: ")


# As PyTorch 2.4 to 2.9 and NCCL have them.
@pytest.mark.parametrize(
    "text",
    [
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7",
        "NCCL communicator was aborted on rank 0. Original reason for failure was: ..",
        "NCCL error in: NCCLUtils.hpp:317, remote process exited or there was a network error",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process",
        "[1] is setting up NCCL communicator, but store->get('0') got error: Socket Timeout",
        "wait timeout after 1800000ms, keys: /default_pg/0//cuda//timeout_dump",
        "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server ..",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:4711",
    ],
)
def test_lost_processes_are_recognized_by_what_is_said(monkeypatch, capsys, text):
    def main():
        raise dist.DistBackendError(text)

    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    assert launching.guarded(job_of(main)) == 2
    assert "another process of this run is gone or does not answer" in capsys.readouterr().err


def test_other_errors_of_nccl_are_not_explained_away(monkeypatch):
    def main():
        raise dist.DistBackendError("Duplicate GPU detected: rank 1 and rank 0 both on device 1000")

    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(dist.DistBackendError):
        launching.guarded(job_of(main))


def _arguments(num_gpus):
    return argparse.Namespace(
        num_gpus=num_gpus, num_machines=1, machine_rank=0, dist_url="auto", debug=False
    )


@pytest.mark.parametrize("launcher", ["torchrun", "num-gpus"])
def test_one_gpu_for_several_processes(tiny_cfg, monkeypatch, launcher):
    if launcher == "torchrun":
        for name, value in (("RANK", 1), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
    cfg, count = tiny_cfg("train.device=cuda:0"), 1 if launcher == "torchrun" else 2
    with pytest.raises(ConfigError, match=r"cuda:0 is one GPU, but the run has 2 processes: set "):
        launching.launch(print, cfg, _arguments(count))
    cfg.train.device = "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"2 processes are to run on this machine, .* has 1 GPU"):
        launching.launch(print, cfg, _arguments(count))


def test_a_gpu_that_is_not_there(tiny_cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="train.device=cuda:2 but this machine has 2 GPU"):
        build_model(tiny_cfg("train.device=cuda:2"))
