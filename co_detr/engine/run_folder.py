"""The output folder of a run: whose it is, who writes to it, what describes the run in it.

A run has an id, in `run.json` and in each of its checkpoints. A training that starts in the folder
of another one puts its own id there with its first step; what the other has left is then not
continued as if it were this one's.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from omegaconf import DictConfig

from co_detr.engine.config import config_content, leaves, read_yaml, to_text
from co_detr.engine.launch import raise_jointly
from co_detr.errors import CheckpointError, ConfigError, UserError, WriteError
from co_detr.files import written_whole

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
_LOCK_FILE = ".lock"
_NOT_SET = object()
_EVALUATION = "evaluation"  # the subfolder of evaluations beside a training


@dataclass(frozen=True)
class RunIdentity:
    """What tells a run from others that have used its folder.

    Attributes:
        run_id: random.
        started: date and time.
        adopts_unnamed: whether checkpoints without an id, of earlier versions, are this run's, too.
    """

    run_id: str
    started: str
    adopts_unnamed: bool = False

    @classmethod
    def new(cls, adopts_unnamed: bool = False, run_id: str | None = None) -> RunIdentity:
        return cls(run_id or uuid.uuid4().hex[:12], _now(), adopts_unnamed)

    def owns(self, run_id: str | None) -> bool:
        """Whether a checkpoint with this id belongs to the run."""
        return run_id == self.run_id or (run_id is None and self.adopts_unnamed)

    def write(self, folder: str) -> None:
        with written_whole(os.path.join(folder, RUN_FILE)) as file:
            json.dump(asdict(self), file, indent=1)
            file.write("\n")


def read_identity(folder: str) -> RunIdentity | None:
    """The run that was last started in `folder`; None: none, or by an earlier version.

    Raises:
        CheckpointError: if the file is damaged.
    """
    path = os.path.join(folder, RUN_FILE)
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return RunIdentity(**json.load(file))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): remove it to continue from the checkpoints that are "
            "there, whichever run they are of."
        ) from error


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
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": _now()}
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
        name in (RUN_FILE, METRICS_FILE, "last_checkpoint")
        or (name.startswith("model_") and name.endswith(".pth"))
        for name in names
    )


def evaluation_folder(output_dir: str) -> str:
    """Where an evaluation without training writes: in a training's folder, to a subfolder.

    Every process has to call this; all get what the main process sees.
    """
    inside = comm.all_gather(holds_training(output_dir))[0]
    return os.path.join(output_dir, _EVALUATION) if inside else output_dir


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


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
        earlier = read_yaml(path)
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
        if before.get(key, _NOT_SET) != now.get(key, _NOT_SET)
    ]
    if changed:
        logger.info("Settings that differ from those in %s: %s", path, "; ".join(changed))
    return to_text(content)
