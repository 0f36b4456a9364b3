"""What is kept about the processes that made a run, as `ablation_run.json` in its folder."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from co_detr.checkpoint.saving import has_checkpoints
from co_detr.errors import CheckpointError, ConfigError
from co_detr.files import written_whole

RECORD_FILE = "ablation_run.json"


@dataclass(frozen=True)
class Attempt:
    """One process of a run, which several may make when it is interrupted.

    Attributes:
        started: date and time.
        environment: one line: software, processor, threads.
        first_iteration: where it went on from.
        end: what it took; None while it runs, or if ablate.py was killed before it ended.
    """

    started: str
    environment: str
    first_iteration: int
    end: AttemptEnd | None = None


@dataclass(frozen=True)
class AttemptEnd:
    """What a process took until it ended.

    Attributes:
        exit_code: minus the signal, if one ended it.
        iterations: how far the run was then, as its checkpoints have it.
        wall_seconds, cpu_seconds: of the whole process: start, training, evaluation. CPU time is
            user and system time with all threads and data workers.
        peak_bytes: resident memory.
        problem: one sentence on why the run did not come to its end; None: it did, or was asked to
            stop.
    """

    exit_code: int
    iterations: int
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    problem: str | None


@dataclass(frozen=True)
class RunRecord:
    """A run so far.

    Attributes:
        settings: the config and all overrides that make it, see `RunSpec.settings`.
        attempts: in their order.
    """

    settings: list[str]
    attempts: tuple[Attempt, ...] = ()

    @property
    def ended(self) -> list[tuple[Attempt, AttemptEnd]]:
        return [(each, each.end) for each in self.attempts if each.end is not None]

    @property
    def problem(self) -> str | None:
        """Why the last attempt did not come to its end."""
        last = self.attempts[-1].end if self.attempts else None
        return last.problem if last else None

    def starting(self, attempt: Attempt) -> RunRecord:
        return dataclasses.replace(self, attempts=(*self.attempts, attempt))

    def ending(self, end: AttemptEnd) -> RunRecord:
        """The last attempt has ended."""
        last = dataclasses.replace(self.attempts[-1], end=end)
        return dataclasses.replace(self, attempts=(*self.attempts[:-1], last))

    def write(self, folder: Path) -> None:
        with written_whole(str(folder / RECORD_FILE)) as file:
            json.dump(dataclasses.asdict(self), file, indent=1)
            file.write("\n")


def read_record(folder: Path, settings: list[str]) -> RunRecord:
    """The record of a folder, or an empty one if there is no run in it.

    Raises:
        ConfigError: if the folder holds a run with other settings than these.
        CheckpointError: if the record is damaged.
    """
    path = folder / RECORD_FILE
    if not path.exists():
        if has_checkpoints(str(folder)):
            raise ConfigError(
                f"{folder} holds a training that is not of a grid: move it away, or choose "
                "another --output-dir."
            )
        return RunRecord(settings)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        attempts = tuple(_attempt(each) for each in content["attempts"])
        record = RunRecord(list(content["settings"]), attempts)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is no record of a run ({error!r}): move the folder away to repeat the run."
        ) from error
    if record.settings != settings:
        raise ConfigError(
            f"{folder} holds a run with other settings ({_difference(record.settings, settings)}): "
            "choose another --output-dir, or move the folder away to repeat the run."
        )
    return record


def _attempt(content: dict) -> Attempt:
    end = content.pop("end")
    return Attempt(**content, end=None if end is None else AttemptEnd(**end))


def _difference(before: list[str], now: list[str]) -> str:
    gone = [text for text in before if text not in now]
    new = [text for text in now if text not in before]
    if not gone and not new:
        return "the same ones in another order"
    return f"it has {' '.join(gone) or 'nothing'} where now is {' '.join(new) or 'nothing'}"
