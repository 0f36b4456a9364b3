"""The checkpoints of one run: their names, which of them can be read, which are too many."""

from __future__ import annotations

import logging
import os
import re
import zipfile
from contextlib import suppress

import torch
from detectron2.utils import comm

from co_detr.engine.joint import raise_jointly
from co_detr.engine.run_folder import RUN_FILE, RunIdentity, read_identity
from co_detr.errors import CheckpointError

logger = logging.getLogger(__name__)

MARKER = "last_checkpoint"  # holds the name of the newest checkpoint, as in Detectron2
FINAL = "model_final.pth"
RUN_ID = "run_id"  # the key in a checkpoint

_NUMBERED = re.compile(r"model_(\d{7,})\.pth")


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
