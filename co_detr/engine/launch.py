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
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
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
_OF_TRAINING = {
    "goes_on": "continue with --resume",
    "interrupted": "--resume continues from the last checkpoint",
    "kept": "checkpoints",
}
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


@dataclass(frozen=True)
class Job:
    """What a command does in each of its processes.

    Attributes:
        main: the work, which spawned processes import. A whole number that it returns is the exit
            code of its process.
        program: the command, for messages.
        device: of the processes.
        device_option: what sets it, for messages.
        patience: how long a process waits for another one.
        debug: let errors through, so that their tracebacks show.
        goes_on: what to do after something from without has ended a process.
        interrupted: what is said after Ctrl-C.
        kept: what is not lost then, in the plural.
        num_gpus, num_machines, machine_rank, dist_url: as of Detectron2's `launch`.
    """

    main: Callable[[], object]
    program: str
    device: str
    device_option: str
    patience: timedelta
    debug: bool
    goes_on: str
    interrupted: str
    kept: str
    num_gpus: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"


def launch(main: Main, cfg: DictConfig, args: argparse.Namespace) -> int:
    """Runs `main(cfg, args)` of a training; see `launch_job`."""
    return launch_job(
        Job(
            main=partial(main, cfg, args),
            program="train_net.py",
            device=cfg.train.device,
            device_option="train.device=",
            patience=timedelta(minutes=cfg.train.process_timeout_minutes),
            debug=args.debug,
            **_OF_TRAINING,
            num_gpus=args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
        )
    )


def launch_job(job: Job) -> int:
    """Runs a job in every process that it or `torchrun` asks for.

    Returns:
        The exit code: 0, 2 after an error that was explained in one sentence, 130 after Ctrl-C, or
        what the job returns.
    """
    if under_torchrun():
        _check_devices(job, int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"]))
        return _run_under_torchrun(job)
    _check_devices(job, job.num_gpus * job.num_machines, job.num_gpus)
    if job.num_gpus * job.num_machines == 1:
        return guarded(job)
    if job.num_machines > 1 and job.dist_url == "auto":
        raise ConfigError("--num-machines needs --dist-url tcp://ADDRESS_OF_MACHINE_0:PORT.")
    # Detectron2 talks over NCCL wherever a GPU is present, whatever the device is.
    if torch.cuda.is_available() and torch.device(job.device).type == "cpu":
        raise ConfigError(
            f"--num-gpus with {job.device_option}cpu is not possible on a machine with GPUs: start "
            f"CPU processes with torchrun --nproc-per-node N {job.program} ..."
        )
    try:
        with _forwarded_signals():
            launch_processes(
                _exit_guarded,
                job.num_gpus,
                num_machines=job.num_machines,
                machine_rank=job.machine_rank,
                dist_url=job.dist_url,
                args=(job,),
                timeout=job.patience,
            )
    except mp.ProcessExitedException as error:
        if error.signal_name is None:
            return error.exit_code  # the process has said why
        raise LostProcessError(
            f"process {error.error_index} was ended by {error.signal_name} and the others were "
            f"stopped: find out what ended it (often a lack of memory), and {job.goes_on}."
        ) from error
    except KeyboardInterrupt:
        return _INTERRUPTED  # the first process has said so
    return 0


def under_torchrun() -> bool:
    """Whether this is a process of `torchrun`, or of a scheduler that names ranks as it does."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def guarded(job: Job) -> int:
    """Does the work in this process and reports what ends it in one sentence.

    Returns:
        the exit code, see `launch_job`.
    """
    try:
        code = job.main()
    except UserError as error:
        report(error, job.debug)
        return 2
    except KeyboardInterrupt:
        if comm.is_main_process():
            print(f"Interrupted: {job.interrupted}.", file=sys.stderr)
        return _INTERRUPTED
    except (OSError, RuntimeError) as error:
        explained = _explained(error, job)
        if explained is None:
            raise
        report(explained, job.debug)
        return 2
    return code if isinstance(code, int) else 0


def _explained(error: OSError | RuntimeError, job: Job) -> UserError | None:
    """The sentence for what can happen to any program on a shared machine."""
    if isinstance(error, OSError) and error.errno in _NOT_WRITTEN:
        name = error.filename or "a file of the run, such as metrics.jsonl,"
        explained: UserError = WriteError(
            f"{name} cannot be written ({error.strerror}): make room or correct the permissions, "
            f"and {job.goes_on}; the {job.kept} written so far are intact."
        )
    elif comm.get_world_size() > 1 and any(sign in str(error) for sign in _LOST_PEER):
        explained = LostProcessError(
            f"another process of this run is gone or does not answer ({first_line(error)}): see "
            f"what it said, and {job.goes_on}."
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


def _check_devices(job: Job, processes: int, on_this_machine: int) -> None:
    """Every process has a GPU of its own.

    Raises:
        ConfigError: the same in all processes, before they wait for each other.
    """
    device = torch.device(job.device)
    if processes == 1 or device.type != "cuda":
        return
    if device.index is not None:
        raise ConfigError(
            f"{job.device_option}{job.device} is one GPU, but the run has {processes} processes: "
            f"set {job.device_option}cuda, which gives each process its own (CUDA_VISIBLE_DEVICES "
            "chooses among those of the machine)."
        )
    count = torch.cuda.device_count()
    if torch.cuda.is_available() and on_this_machine > count:
        raise ConfigError(
            f"{on_this_machine} processes are to run on this machine, but it has {count} GPU(s): "
            "start no more (--num-gpus, or --nproc-per-node of torchrun) than there are."
        )


def _exit_guarded(job: Job) -> None:
    _share_patience(job.patience)
    code = guarded(job)
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


def _share_patience(patience: timedelta) -> None:
    """Lets processes wait for each other's objects as long as for tensors.

    Beside NCCL, Detectron2 sends objects (results, errors) through a gloo group that it makes at
    the first use, with a timeout of half an hour that it offers no setting for. Most of the waiting
    is done there, as for a long evaluation of the main process.
    """
    if dist.get_backend() == "nccl":
        group = dist.new_group(backend="gloo", timeout=patience)
        comm._get_global_gloo_group = lambda: group


def _run_under_torchrun(job: Job) -> int:
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(job.device)
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank if device.index is None else device.index)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=job.patience)
    _share_patience(job.patience)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    code = guarded(job)
    # Where something has failed, others may never come to this point: no waiting for them.
    if code == 0:
        dist.destroy_process_group()
    return code
