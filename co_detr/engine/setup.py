"""What happens before a run: messages, seeds, switches of PyTorch, the model, the output folder.

A training keeps others out of its folder, and an evaluation keeps out of a training's. What
describes a run in its folder is written when the run has something to put there.
"""

from __future__ import annotations

import fcntl
import json
import logging
import logging.handlers
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader

from co_detr.checkpoint.saving import MARKER, RUN_FILE
from co_detr.engine.config_yaml import (
    config_content,
    in_present_terms,
    leaves,
    read_yaml,
    to_text,
)
from co_detr.engine.launch import raise_jointly
from co_detr.errors import ConfigError, UserError, WriteError
from co_detr.files import time_stamp, written_whole
from co_detr.process_setup import keep_freed_memory

logger = logging.getLogger(__name__)

_LOGGERS = ("detectron2", "fvcore", "co_detr")
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
_LOCK_FILE = ".lock"
_EVALUATION = "evaluation"  # the subfolder of evaluations beside a training


class RunLog:
    """All messages of a run, for a file that may be opened later.

    A start that fails shall not touch the folder of a run that has ended well: until the training
    runs, messages are kept in memory (and are on the console).
    """

    def __init__(self) -> None:
        self._early = logging.handlers.MemoryHandler(
            capacity=1_000_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False
        )
        self._handler: logging.Handler = self._early
        self._attach(self._early)

    def open(self, folder: str) -> None:
        """Puts everything so far and from now on into `folder`/log.txt; only the first call counts.

        Other processes than the main one have log.txt.rank1 and so on.
        """
        if self._handler is not self._early:
            return
        rank = comm.get_rank()
        name = f"log.txt.rank{rank}" if rank else "log.txt"
        os.makedirs(folder, exist_ok=True)
        file = logging.FileHandler(os.path.join(folder, name), encoding="utf-8")
        file.setFormatter(
            logging.Formatter(
                "[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt="%m/%d %H:%M:%S"
            )
        )
        self._early.setTarget(file)
        self._early.flush()
        self._attach(file)

    def _attach(self, handler: logging.Handler) -> None:
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self._handler)
            logging.getLogger(name).addHandler(handler)
        self._handler = handler


def setup_run(cfg: DictConfig) -> RunLog:
    """Does what Detectron2's ``default_setup`` does, but writes nothing, and less to the console.

    On the CPU also keeps freed memory for the next step (`keep_freed_memory`).

    Returns:
        What takes the messages from now on.
    """
    if torch.device(cfg.train.device).type == "cpu":
        keep_freed_memory()
    # On a full disk each line of the log would end in a traceback. The next file of more weight,
    # metrics.jsonl or a checkpoint, stops the run with one sentence.
    logging.raiseExceptions = False
    rank = comm.get_rank()
    for name in _LOGGERS:
        setup_logger(None, distributed_rank=rank, name=name)
    log = RunLog()
    # The dataset serializer and the checkpoint loader tell their progress at the info level.
    for name in ("detectron2.data.common", "fvcore.common.checkpoint"):
        logging.getLogger(name).setLevel(logging.WARNING)
    seed_all_rng(cfg.train.seed + rank)
    logger.info(
        "torch %s on %s with %d threads, %d process(es)",
        torch.__version__,
        cfg.train.device,
        torch.get_num_threads(),
        comm.get_world_size(),
    )
    if cfg.train.amp.enabled:
        warn_of_emulation(cfg.train.device, cfg.train.amp.dtype, "train.amp.enabled=false")
    return log


def warn_of_emulation(device: str | torch.device, dtype: str, remedy: str) -> None:
    """Warns if a CPU has no instructions for a type of 16 bits.

    Products in it are computed all the same, element by element: a training step of the small model
    took eight times as long as in float32 on a CPU with AVX2 (AMD EPYC of the third generation).

    Args:
        dtype: "bfloat16" or "float16".
        remedy: what to set or to leave out.
    """
    if torch.device(device).type != "cpu":
        return
    # PyTorch has no public name for the question; another build may lack these.
    operators = getattr(torch.ops, "mkldnn", None)
    name = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}[dtype]
    supported = getattr(operators, name, None)
    if supported is not None and not supported():
        logger.warning(
            "This CPU has no instructions for %s, which makes it several times slower than float32 "
            "here: %s.",
            *(dtype, remedy),
        )


def build_model(cfg: DictConfig) -> nn.Module:
    """Builds `cfg.model` on `cfg.train.device`.

    Raises:
        ConfigError: if the device does not exist here.
    """
    device = torch.device(cfg.train.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"train.device={cfg.train.device} but no CUDA device is here: set train.device=cpu."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"train.device={cfg.train.device} but this machine has {torch.cuda.device_count()} "
            "GPU(s), counted from 0: name one of these."
        )
    configure_torch(cfg.train)
    model = instantiate(cfg.model).to(cfg.train.device)
    if cfg.train.compile:
        model.compile_layers()
    return model


@dataclass(frozen=True)
class CudaSettings:
    """The node ``train.cuda``; without effect on the CPU.

    Attributes:
        tf32: whether float32 matrix products and convolutions run on tensor cores, with 10 bits of
            mantissa (NVIDIA Ampere and newer). Sums and everything else stay in float32.
        cudnn_benchmark: whether cuDNN tries which algorithm is fastest for each new image size,
            which pays where all images have one size.
    """

    tf32: bool = True
    cudnn_benchmark: bool = False

    def apply(self) -> None:
        # Not the names that PyTorch 2.9 has introduced: 2.4 lacks them, and both do not mix.
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        torch.backends.cudnn.allow_tf32 = self.tf32
        torch.backends.cudnn.benchmark = self.cudnn_benchmark


def configure_torch(train: DictConfig) -> None:
    """Sets what ``train.cuda`` and ``train.deterministic`` ask for, for the whole process.

    To be called before the model is on the GPU. A config without these nodes, of an earlier
    version, leaves everything as it is.
    """
    settings = _settings(train, train.device)
    if settings is not None:
        settings.apply()
    if train.get("deterministic", False):
        # Read by cuBLAS when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Operators that have no deterministic kernel are named in a warning.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False


@contextmanager
def cuda_settings(train: DictConfig, device: torch.device) -> Iterator[None]:
    """``train.cuda`` inside of the block alone, for a model in somebody else's process."""
    settings = _settings(train, device)
    if settings is None:
        yield
        return
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    settings.apply()
    try:
        yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def pin_for(loader: DataLoader, device: str) -> DataLoader:
    """Lets a loader put tensors where a GPU can fetch them while it computes."""
    loader.pin_memory = torch.device(device).type == "cuda"
    return loader


def _settings(train: DictConfig, device: str | torch.device) -> CudaSettings | None:
    if "cuda" not in train or torch.device(device).type != "cuda":
        return None
    return CudaSettings(**train.cuda)


@contextmanager
def exclusive(folder: str) -> Iterator[None]:
    """Keeps other trainings out of `folder` inside of the block; every process has to enter it.

    The main process holds a lock of the operating system, which ends with the process however it
    ends, and is not inherited by its loading workers. Network file systems have it as well unless
    they are mounted without locks; then only trainings of the same machine see each other.

    Raises:
        ConfigError: in all processes, if another training has the lock.
        WriteError: in all processes, if the folder cannot be written.
    """
    problem: UserError | None = None
    descriptor = None
    if comm.is_main_process():
        try:
            descriptor = _locked(folder)
        except UserError as error:
            problem = error
    raise_jointly(problem)
    try:
        yield
    finally:
        if descriptor is not None:
            os.ftruncate(descriptor, 0)
            os.close(descriptor)


def _locked(folder: str) -> int | None:
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(os.path.join(folder, _LOCK_FILE), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise WriteError(
            f"train.output_dir={folder} cannot be written ({error.strerror}): choose another one."
        ) from error
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = _holder(descriptor)
        os.close(descriptor)
        raise ConfigError(
            f"another run{holder} is writing to {folder}: wait until it ends or stop it, or choose "
            "another train.output_dir."
        ) from None
    except OSError as error:
        os.close(descriptor)
        logger.warning(
            "%s cannot be locked (%s): see to it that no other run writes to it.",
            *(folder, error.strerror),
        )
        return None
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": time_stamp()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    return descriptor


def _holder(descriptor: int) -> str:
    try:
        found: dict[str, Any] = json.loads(os.pread(descriptor, 1000, 0))
        return f" (process {found['process']} on {found['host']}, since {found['since']})"
    except (ValueError, TypeError, KeyError):  # it is just being written
        return ""


def holds_training(folder: str) -> bool:
    """Whether a training has left something in `folder`."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return any(
        name in (RUN_FILE, METRICS_FILE, MARKER)
        or (name.startswith("model_") and name.endswith(".pth"))
        for name in names
    )


def evaluation_folder(output_dir: str) -> str:
    """Where an evaluation without training writes: in a training's folder, to a subfolder.

    Every process has to call this; all get what the main process sees.
    """
    inside = comm.all_gather(holds_training(output_dir))[0]
    return os.path.join(output_dir, _EVALUATION) if inside else output_dir


def write_description(folder: str, config: str) -> None:
    """Writes ``config.yaml`` (from `config_text`) and ``environment.txt``; in the main process."""
    os.makedirs(folder, exist_ok=True)
    for name, text in ((CONFIG_FILE, config), ("environment.txt", collect_env_info() + "\n")):
        with written_whole(os.path.join(folder, name)) as file:
            file.write(text)


def description_of_resumed(cfg: DictConfig, folder: str) -> str:
    """What ``config.yaml`` is to say of a run that goes on; logs what differs from the one there.

    The settings are the new ones, but a run that goes on does not start from
    ``train.init_checkpoint``: that one stays.
    """
    content = config_content(cfg)
    path = os.path.join(folder, CONFIG_FILE)
    if not os.path.isfile(path):
        return to_text(content)
    try:
        earlier = in_present_terms(read_yaml(path))
    except ConfigError as error:
        logger.warning("What has changed since this run began is not known: %s", error)
        return to_text(content)
    before, now = dict(leaves(earlier)), dict(leaves(content))
    init = "train.init_checkpoint"
    if now.get(init) and before.get(init) != now[init]:
        logger.warning("%s=%s has no effect: the run goes on from its own.", init, now[init])
    if init in before:
        content["train"]["init_checkpoint"] = now[init] = before[init]
    changed = [
        f"{key}: {before.get(key, 'not set')} -> {now.get(key, 'not set')}"
        for key in dict.fromkeys((*now, *before))
        if before.get(key) != now.get(key)  # without a key a setting is null
    ]
    if changed:
        logger.info("Settings that differ from those in %s: %s", path, "; ".join(changed))
    return to_text(content)
