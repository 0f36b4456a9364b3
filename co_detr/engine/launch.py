"""Processes: `torchrun`, Detectron2's `launch`, or just this one; and what they decide together."""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import launch as launch_processes
from detectron2.utils import comm
from omegaconf import DictConfig

from co_detr.errors import ConfigError, LostProcessError, UserError, WriteError, first_line
from co_detr.process_setup import SIGNALS

Main = Callable[[DictConfig, argparse.Namespace], object]
_INTERRUPTED = 128 + signal.SIGINT  # as shells have it
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
# What is said where a peer is gone or does not answer.
_LOST_PEER = (
    # gloo
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out"),
    # NCCL and its watchdog
    *("NCCL communicator was aborted", "Watchdog caught collective operation timeout"),
    *("remote process exited", "remote process has terminated", "ncclRemoteError"),
    *("ncclInProgress", "unhandled system error", "failed to recv, got 0 bytes"),
    # the store in which processes find each other
    *(
        "Socket Timeout",
        "wait timeout after",
        "Connection was likely closed",
        "recvValueWithTimeout",
    ),
)
T = TypeVar("T")


def launch(main: Main, cfg: DictConfig, args: argparse.Namespace) -> int:
    """Runs `main(cfg, args)` in every process that `args` or `torchrun` asks for.

    Returns:
        The exit code: 0, 2 after an error that was explained in one sentence, 130 after Ctrl-C.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _check_devices(cfg, int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"]))
        return _run_under_torchrun(main, cfg, args)
    _check_devices(cfg, args.num_gpus * args.num_machines, args.num_gpus)
    if args.num_gpus * args.num_machines == 1:
        return guarded(main, cfg, args)
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ConfigError("--num-machines needs --dist-url tcp://ADDRESS_OF_MACHINE_0:PORT.")
    # Detectron2 talks over NCCL wherever a GPU is present, whatever train.device says.
    if torch.cuda.is_available() and torch.device(cfg.train.device).type == "cpu":
        raise ConfigError(
            "--num-gpus with train.device=cpu is not possible on a machine with GPUs: start CPU "
            "processes with torchrun --nproc-per-node N train_net.py ..."
        )
    try:
        with _forwarded_signals():
            launch_processes(
                _exit_guarded,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, cfg, args),
                timeout=_patience(cfg),
            )
    except mp.ProcessExitedException as error:
        if error.signal_name is None:
            return error.exit_code  # the process has said why
        raise LostProcessError(
            f"process {error.error_index} was ended by {error.signal_name} and the others were "
            "stopped: find out what ended it (often a lack of memory), and continue with --resume."
        ) from error
    except KeyboardInterrupt:
        return _INTERRUPTED  # the first process has said so
    return 0


def guarded(main: Main, cfg: DictConfig, args: argparse.Namespace) -> int:
    """Runs `main` and reports what ends it in one sentence; returns the exit code."""
    try:
        main(cfg, args)
    except UserError as error:
        report(error, args.debug)
        return 2
    except KeyboardInterrupt:
        if comm.is_main_process():
            print("Interrupted: --resume continues from the last checkpoint.", file=sys.stderr)
        return _INTERRUPTED
    except (OSError, RuntimeError) as error:
        explained = _explained(error)
        if explained is None:
            raise
        report(explained, args.debug)
        return 2
    return 0


def _explained(error: OSError | RuntimeError) -> UserError | None:
    """The sentence for what can happen to any program on a shared machine."""
    if isinstance(error, OSError) and error.errno in _NOT_WRITTEN:
        name = error.filename or "a file of the run, such as metrics.jsonl,"
        explained: UserError = WriteError(
            f"{name} cannot be written ({error.strerror}): make room or correct the permissions, "
            "and continue with --resume; the checkpoints written so far are intact."
        )
    elif comm.get_world_size() > 1 and any(sign in str(error) for sign in _LOST_PEER):
        explained = LostProcessError(
            f"another process of this run is gone or does not answer ({first_line(error)}): see "
            "what it said, and continue with --resume."
        )
    else:
        return None
    explained.__cause__ = error
    return explained


def report(error: UserError, debug: bool) -> None:
    """Prints the error's sentence to stderr, or raises it again to show its traceback."""
    if debug:
        raise error
    if error.joint and not comm.is_main_process():
        return
    prefix = f"[rank {comm.get_rank()}] " if comm.get_world_size() > 1 else ""
    print(f"{prefix}error: {error.sentence}", file=sys.stderr, flush=True)


def jointly(do: Callable[[], T]) -> T:
    """Lets the main process do something, and all know the result; every process has to call this.

    Raises:
        UserError: in all processes, if the main process raises one or a file cannot be written.
    """
    result, problem = None, None
    if comm.is_main_process():
        try:
            result = do()
        except UserError as error:
            problem = error
        except OSError as error:
            name = error.filename or "a file of the run"
            problem = WriteError(
                f"{name} cannot be written ({error.strerror or os.strerror(error.errno or 0)}): "
                "make room or correct the permissions, and start again."
            )
            problem.__cause__ = error
    raise_jointly(problem)
    return comm.all_gather(result)[0]


def raise_jointly(error: UserError | None) -> None:
    """Raises in every process what one of them found; every process has to call this.

    A process that raised alone would leave the others waiting for it.

    Args:
        error: this process's, or None. The one of the lowest rank is raised.
    """
    for found in comm.all_gather(None if error is None else (type(error), str(error))):
        if found is not None:
            kind, message = found
            joint = kind(message)
            joint.joint = True
            raise joint from error


def _check_devices(cfg: DictConfig, processes: int, on_this_machine: int) -> None:
    """Every process has a GPU of its own.

    Raises:
        ConfigError: the same in all processes, before they wait for each other.
    """
    device = torch.device(cfg.train.device)
    if processes == 1 or device.type != "cuda":
        return
    if device.index is not None:
        raise ConfigError(
            f"train.device={cfg.train.device} is one GPU, but the run has {processes} processes: "
            "set train.device=cuda, which gives each process its own (CUDA_VISIBLE_DEVICES chooses "
            "among those of the machine)."
        )
    count = torch.cuda.device_count()
    if torch.cuda.is_available() and on_this_machine > count:
        raise ConfigError(
            f"{on_this_machine} processes are to run on this machine, but it has {count} GPU(s): "
            "start no more (--num-gpus, or --nproc-per-node of torchrun) than there are."
        )


def _exit_guarded(main: Main, cfg: DictConfig, args: argparse.Namespace) -> None:
    _share_patience(_patience(cfg))
    code = guarded(main, cfg, args)
    if code:
        sys.exit(code)


@contextmanager
def _forwarded_signals() -> Iterator[None]:
    """Hands signals that ask for a stop on to the processes, as torchrun does."""

    def forward(number: int, frame: FrameType | None) -> None:
        for process in multiprocessing.active_children():
            if process.pid is not None:
                os.kill(process.pid, number)

    before = {stop: signal.signal(stop, forward) for stop in SIGNALS}
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)


def _patience(cfg: DictConfig) -> timedelta:
    return timedelta(minutes=cfg.train.process_timeout_minutes)


def _share_patience(patience: timedelta) -> None:
    """Lets processes wait for each other's objects as long as for tensors.

    Beside NCCL, Detectron2 sends objects (results, errors) through a gloo group that it makes at
    the first use, with a timeout of half an hour that it offers no setting for. Most of the waiting
    is done there, as for a long evaluation of the main process.
    """
    if dist.get_backend() == "nccl":
        group = dist.new_group(backend="gloo", timeout=patience)
        comm._get_global_gloo_group = lambda: group


def _run_under_torchrun(main: Main, cfg: DictConfig, args: argparse.Namespace) -> int:
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(cfg.train.device)
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank if device.index is None else device.index)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_patience(cfg))
    _share_patience(_patience(cfg))
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    code = guarded(main, cfg, args)
    # Where something has failed, others may never come to this point: no waiting for them.
    if code == 0:
        dist.destroy_process_group()
    return code
