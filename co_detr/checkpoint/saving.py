"""The checkpoints of a run: written whole or not at all, resumed from the last one that is whole.

`Checkpointer` saves and loads; below it are the names of a run's checkpoints, which of them can be
read, which are of another run, and which are too many.
"""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn

from co_detr.checkpoint.fetching import local_file
from co_detr.checkpoint.loading import LoadReport, Mismatch, load_weights, timm_content
from co_detr.checkpoint.reading import (
    AVERAGED,
    Weights,
    choose_weights,
    read_checkpoint,
    stored_class_names,
    with_present_names,
)
from co_detr.engine.launch import raise_jointly
from co_detr.errors import CheckpointError, ConfigError
from co_detr.files import time_stamp, write_error_of, written_whole
from co_detr.modeling.backbones.timm import ADDRESS

logger = logging.getLogger(__name__)

MARKER = "last_checkpoint"  # holds the name of the newest checkpoint, as in Detectron2
FINAL = "model_final.pth"
RUN_FILE = "run.json"  # says whose the folder is
RUN_ID = "run_id"  # the key in a checkpoint

_NUMBERED = re.compile(r"model_(\d{7,})\.pth")


class Checkpointer:
    """Saves and loads a model and what is trained with it.

    In place of Detectron2's `DetectionCheckpointer`: it does not guess, and runs nothing that is in
    a file.

    - `save` writes to a temporary file first: a run that is killed while it saves leaves the
      checkpoints that it wrote before, and the note of the last one, as they were.
    - `resume_or_load` passes over a last checkpoint that is missing or damaged, with a warning.
    - `load` raises a CheckpointError if the file does not fit (see `load_weights`), and logs what
      it did.

    Args:
        model: to load into and to save.
        save_dir: where `save` writes.
        mismatch: what to do with a file that does not fit (train.init_checkpoint_mismatch).
        unsafe: let a file run code while it is read (train.init_checkpoint_unsafe).
        weights: which weights to load of a file that has two sets (train.init_checkpoint_weights);
            None: those that training goes on from.
        class_names: of the data, in order; saved in every checkpoint.
        class_sources: with mismatch "by_name", of classes that start from the rows of a class of
            another name, that name (train.init_checkpoint_classes).
        checkpointables: what else to save and to resume; each has `state_dict` and
            `load_state_dict`.

    Attributes:
        run_id: of the run, saved in every checkpoint; None: of none.
        resumed_from: path of the checkpoint that `resume_or_load` has resumed from, or "".
        report: of the last file that was loaded; None: none was.

    Raises:
        ConfigError: if `mismatch` is none of the three.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        mismatch: Mismatch = "error",
        unsafe: bool = False,
        weights: Weights | None = "ema",
        class_names: Sequence[str] | None = None,
        class_sources: Mapping[str, str] | None = None,
        **checkpointables: Any,
    ) -> None:
        if mismatch not in ("error", "by_name", "reset"):
            raise ConfigError(
                f'train.init_checkpoint_mismatch={mismatch} must be "error", "by_name" or "reset".'
            )
        if class_sources and mismatch != "by_name":
            raise ConfigError(
                "train.init_checkpoint_classes pairs classes of other names, which only "
                "train.init_checkpoint_mismatch=by_name does: set that, too."
            )
        self.model = model
        self.save_dir = save_dir
        self.checkpointables = checkpointables
        self.mismatch = mismatch
        self.unsafe = unsafe
        self.weights = weights
        self.class_names = None if class_names is None else list(class_names)
        self.class_sources = class_sources
        self.run_id: str | None = None
        self.resumed_from = ""
        self.report: LoadReport | None = None

    def save(self, name: str, *, tag: bool = True, **kwargs: Any) -> None:
        """Writes `<name>.pth` and makes it the last checkpoint, unless `tag` is false.

        Raises:
            CheckpointError: if it cannot be written; what was there before is as it was.
        """
        if not self.save_dir or not comm.is_main_process():
            return
        data = {"model": self.model.state_dict()}
        if self.class_names is not None:
            data["class_names"] = self.class_names
        if self.run_id is not None:
            data[RUN_ID] = self.run_id
        data.update({key: part.state_dict() for key, part in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        try:
            with written_whole(path, "wb") as file:
                torch.save(data, file)
            if tag:
                with written_whole(os.path.join(self.save_dir, MARKER)) as file:
                    file.write(os.path.basename(path))
        except (OSError, RuntimeError) as error:
            reason = write_error_of(error)
            if reason is None:
                raise
            kept = self.get_checkpoint_file()
            raise CheckpointError(
                f"checkpoint {path} cannot be written ({reason.strerror or reason}); "
                f"{f'the last one is still {kept}' if kept else 'there is no earlier one'}: make "
                "room or correct the permissions, and continue with --resume."
            ) from error

    def has_checkpoint(self) -> bool:
        """Whether there is something to resume, as the main process sees it."""
        return comm.all_gather(has_checkpoints(self.save_dir))[0]

    def get_checkpoint_file(self) -> str:
        """Path of the last checkpoint, or "" if none is there or its mark cannot be read."""
        try:
            last = _marked(self.save_dir)
        except OSError:  # what cannot be read is not offered; `last_readable` says why
            return ""
        return "" if last is None else os.path.join(self.save_dir, last)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Loads the last checkpoint that can be read, with everything in it, or the weights of
        `path`.

        Raises:
            CheckpointError: see `load` and `last_readable`; also if the last checkpoint lacks what
                this run has to resume, or is not to be seen by all processes.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        self.resumed_from = last_readable_jointly(self.save_dir)
        return self.load(self.resumed_from, resuming=True)

    def load(
        self,
        path: str,
        checkpointables: Sequence[str] | None = None,
        *,
        resuming: bool = False,
    ) -> dict[str, Any]:
        """Loads a file.

        Args:
            path: a file, an address or a name of the model zoo (see `local_file`), or
                ``timm://NAME`` for the backbone alone; "" leaves the model as it is.
            checkpointables: which parts beside the model to load, where the file has them; None:
                all.
            resuming: whether the training goes on, for which the file must have them all.

        Returns:
            What else the file holds, with its `class_names`.

        Raises:
            CheckpointError: if the file is missing, unreadable or does not fit the model.
            ConfigError: if `class_sources` names classes and there are no class heads to load.
        """
        if not path:
            self._refuse_class_sources("there is no checkpoint to start from", resuming)
            logger.info("No checkpoint is given: the weights stay as they were initialized.")
            return {}
        logger.info("Loading %s", path)
        remedy = (
            'set train.init_checkpoint to an existing file, or to "" to start from random weights'
        )
        if path.startswith(ADDRESS):
            content = timm_content(self.model, path)
        else:
            content = read_checkpoint(local_file(path, remedy), self.unsafe)
        if self.weights is not None:
            content = choose_weights(content, self.weights, path)
        # An average of the weights may begin in the course of a training.
        needed = self.checkpointables.keys() - {AVERAGED} if resuming else ()
        if absent := [key for key in self.checkpointables if key in needed and key not in content]:
            raise CheckpointError(
                f"checkpoint {path} has no {' and no '.join(absent)}, so that no training can "
                "go on from it: start a new one with train.init_checkpoint set to it."
            )
        report = load_weights(
            self.model,
            content,
            path,
            mismatch=self.mismatch,
            class_names=self.class_names,
            class_sources=self.class_sources,
            resuming=resuming,
        )
        self.report = report
        if report.classes is None:
            self._refuse_class_sources(f"{path} holds a backbone alone", resuming)
        logger.log(logging.INFO if report.complete else logging.WARNING, report.text())
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in content:
                logger.info("Loading %s", key)
                saved = content.pop(key)
                if key == AVERAGED:
                    saved = with_present_names(saved, self.model)
                self.checkpointables[key].load_state_dict(saved)
        content.pop("model", None)
        return content | {"class_names": stored_class_names(content)}

    def _refuse_class_sources(self, why: str, resuming: bool) -> None:
        """Raises a ConfigError if classes were to start from rows that were not loaded."""
        if self.class_sources and not resuming:
            raise ConfigError(
                f"train.init_checkpoint_classes is for class heads of a checkpoint, but {why}: "
                "leave it out."
            )


@dataclass(frozen=True)
class RunIdentity:
    """What tells a run from others that have used its folder.

    It is in `run.json` and, by its id, in each of the run's checkpoints. A training that starts in
    the folder of another one puts its own there with its first step; what the other has left is
    then not continued as if it were this one's.

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
        return cls(run_id or uuid.uuid4().hex[:12], time_stamp(), adopts_unnamed)

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


def numbered_name(iteration: int) -> str:
    """Name, without its ending, of the checkpoint behind `iteration`."""
    return f"model_{iteration:07d}"


def has_checkpoints(folder: str) -> bool:
    """Whether a run has saved something in `folder`, readable or not."""
    return os.path.isfile(os.path.join(folder, MARKER)) or bool(_saved(folder))


def kept_checkpoints(folder: str) -> list[str]:
    """Paths of the numbered checkpoints, the earliest first, and then of the final one."""
    return [os.path.join(folder, name) for name in sorted(_saved(folder), key=_iteration)]


def last_readable(folder: str) -> str:
    """Path of the newest checkpoint that is whole; warns if it is not the last one.

    That is the one that `last_checkpoint` names, or else the one with the highest iteration below.
    Without `last_checkpoint`, it is the one that was written last. Those of other runs than the one
    that was started last in the folder do not count (`RunIdentity`).

    Raises:
        CheckpointError: if there are checkpoints but none can be read, or all are of other runs.
    """
    last = _marked(folder)
    names = _newest_first(folder, last)
    run = read_identity(folder)
    problems, others = [], []
    for name in names:
        path = os.path.join(folder, name)
        problem = problem_of(path)
        if problem is None and run is not None and not belongs_to(path, run):
            others.append(name)
            continue
        if problem is None:
            if problems:
                logger.warning(
                    "%s: continuing from %s instead, which is the newest one before it that is "
                    "whole; what was trained after it is done again.",
                    "; ".join(problems),
                    path,
                )
            elif last is None:
                logger.warning(
                    "%s does not name a checkpoint: continuing from %s, which was written last.",
                    os.path.join(folder, MARKER),
                    path,
                )
            return path
        problems.append(f"checkpoint {path} {problem}")
    if others and not problems and run is not None:
        raise CheckpointError(
            f"the run that was started last in {folder}, at {run.started}, has saved no checkpoint "
            f"yet, and {others[0]} is of another run before it: leave --resume out to start anew, "
            f"or remove {os.path.join(folder, RUN_FILE)} to continue the other run, with its own "
            "settings."
        )
    raise CheckpointError(
        f"no checkpoint in {folder} can be read ({'; '.join(problems) or 'there is none'}): put a "
        "readable one there, or leave --resume out to start anew."
    )


def last_readable_jointly(folder: str) -> str:
    """`last_readable` as the main process sees it; every process has to call this.

    Raises:
        CheckpointError: see `last_readable`; also if one of them does not see the file.
    """
    found, problem = "", None
    if comm.is_main_process():
        try:
            found = last_readable(folder)
        except CheckpointError as error:
            problem = error
    raise_jointly(problem)
    found = comm.all_gather(found)[0]
    if not os.path.isfile(found):
        problem = CheckpointError(
            f"checkpoint {found} is not to be seen by every process: set train.output_dir to a "
            "folder that all machines share."
        )
    raise_jointly(problem)
    return found


def problem_of(path: str) -> str | None:
    """Why the file cannot be a whole checkpoint of ours, or None; reads and checks every byte."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        return f"is cut off or damaged ({error})"
    return None if damaged is None else f"is damaged (checksum of {damaged})"


def belongs_to(path: str, run: RunIdentity) -> bool:
    """Whether a checkpoint is of the run, and not of another one that has used its folder."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # Without a trainer it is nothing to resume, and loading it says so.
        return "trainer" not in content or run.owns(content.get(RUN_ID))
    except Exception:  # loading says what is wrong with it
        return True


def remove_old(folder: str, newest: str, max_to_keep: int) -> None:
    """Removes numbered checkpoints until `max_to_keep` are left, the oldest first.

    Args:
        folder: where they are.
        newest: name of the one that was just saved, which stays. Those of a higher iteration are
            of an earlier run, or of a part of this run that was done again: they go first.
        max_to_keep: at least 1.
    """
    last = _iteration(newest)
    others = [name for name in _saved(folder) if name not in (newest, FINAL)]
    others.sort(key=lambda name: (_iteration(name) < last, _iteration(name)))
    for name in others[: max(0, len(others) + 1 - max_to_keep)]:
        with suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))


def _saved(folder: str) -> list[str]:
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [name for name in names if _NUMBERED.fullmatch(name) or name == FINAL]


def _iteration(name: str) -> float:
    """Of a numbered checkpoint; others, such as the final one, come after all of these."""
    match = _NUMBERED.fullmatch(name)
    return float("inf") if match is None else int(match[1])


def _marked(folder: str) -> str | None:
    try:
        with open(os.path.join(folder, MARKER), encoding="utf-8", errors="replace") as file:
            name = file.read().strip("\0 \n")
    except FileNotFoundError:
        return None
    return name or None


def _newest_first(folder: str, last: str | None) -> list[str]:
    if last is None:
        return sorted(
            _saved(folder),
            key=lambda name: (os.path.getmtime(os.path.join(folder, name)), _iteration(name)),
            reverse=True,
        )
    before = [name for name in _saved(folder) if _iteration(name) < _iteration(last)]
    return [last, *sorted(before, key=_iteration, reverse=True)]
