"""One run of the plan: what its folder says of it, what is kept about it, and its process.

A run that is interrupted takes several processes. `ablation_run.json` in its folder has all of them
as attempts; how far the training is, its own files say.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from co_detr import script
from co_detr.checkpoint.saving import FINAL, MARKER, has_checkpoints
from co_detr.engine.trainer import GPU_PEAK
from co_detr.engine.validation import HISTORY_FILE
from co_detr.errors import CheckpointError, ConfigError
from co_detr.files import time_stamp, written_whole
from co_detr.tools.ablate.grid import RunSpec

LOG_FILE = "log_ablate.txt"
RECORD_FILE = "ablation_run.json"
_NUMBERED = re.compile(r"model_(\d+)\.pth")
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@dataclass(frozen=True)
class Outcome:
    """A training as its files show it.

    Attributes:
        saved_iterations: that the newest checkpoint has behind it; --resume continues there.
        evaluations: steps -> metrics from 0 to 100; undefined ones are left out.
        is_finished: whether the last checkpoint is the final one, and has been evaluated.
        seconds_per_iteration: median of the log, without evaluations; None if it has none.
        gpu_peak_bytes: that tensors took on the GPU; 0 for a training on the CPU.
    """

    saved_iterations: int
    evaluations: dict[int, dict[str, float]]
    is_finished: bool
    seconds_per_iteration: float | None
    gpu_peak_bytes: int

    @property
    def final(self) -> dict[str, float]:
        """Metrics of the last evaluation; {} before the first."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else {}

    def best(self, metric: str) -> float | None:
        """The highest value over all evaluations."""
        return max(
            (metrics[metric] for metrics in self.evaluations.values() if metric in metrics),
            default=None,
        )


def read_outcome(folder: Path) -> Outcome:
    """Reads a folder, which may be missing or of a run that is not at its end."""
    marker = _text(folder / MARKER).strip("\0 \n")
    records = list(_log(folder / "metrics.jsonl"))
    trained = max(
        (record["iteration"] + 1 for record in records if "total_loss" in record), default=0
    )
    evaluations = _evaluations(folder / HISTORY_FILE)
    numbered = _NUMBERED.fullmatch(marker)
    saved = trained if marker == FINAL else int(numbered[1]) + 1 if numbered else 0
    times = [record["time"] for record in records if "time" in record]
    memory = [record[GPU_PEAK] for record in records if GPU_PEAK in record]
    return Outcome(
        saved_iterations=saved,
        evaluations=evaluations,
        # The final checkpoint is saved before its evaluation, which may have been interrupted.
        is_finished=marker == FINAL and 0 < trained <= max(evaluations, default=0),
        seconds_per_iteration=median(times) if times else None,
        gpu_peak_bytes=round(max(memory, default=0) * 2**20),
    )


def _evaluations(path: Path) -> dict[int, dict[str, float]]:
    try:
        return {int(steps): metrics for steps, metrics in json.loads(_text(path) or "{}").items()}
    except (ValueError, AttributeError):  # damaged: the training refuses to go on, and says so
        return {}


def _log(path: Path) -> Iterator[dict[str, Any]]:
    for line in _text(path).splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return  # a run that was killed can leave half a line at the end


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


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
        return [(attempt, attempt.end) for attempt in self.attempts if attempt.end is not None]

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
        attempts = tuple(_attempt(entry) for entry in content["attempts"])
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


@dataclass(frozen=True)
class RunState:
    """What is known of a run from its folder."""

    spec: RunSpec
    record: RunRecord
    outcome: Outcome

    @classmethod
    def read(cls, spec: RunSpec) -> RunState:
        """Raises ConfigError if the folder holds a run with other settings."""
        return cls(spec, read_record(spec.folder, spec.settings), read_outcome(spec.folder))

    @property
    def is_finished(self) -> bool:
        return self.outcome.is_finished

    @property
    def wall_seconds(self) -> float:
        return sum(end.wall_seconds for _, end in self.record.ended)

    @property
    def cpu_seconds(self) -> float:
        return sum(end.cpu_seconds for _, end in self.record.ended)

    @property
    def cpu_seconds_per_iteration(self) -> float | None:
        """Over the attempts that are known; evaluations and starts are in it."""
        done = sum(end.iterations - begin.first_iteration for begin, end in self.record.ended)
        return self.cpu_seconds / done if done > 0 else None

    @property
    def lost_attempts(self) -> int:
        """Attempts whose end nobody saw; the last one of an unfinished run may be under way."""
        over = self.record.attempts if self.is_finished else self.record.attempts[:-1]
        return sum(attempt.end is None for attempt in over)

    @property
    def peak_bytes(self) -> int:
        """On the GPU, or for a training on the CPU the resident memory."""
        resident = max((end.peak_bytes for _, end in self.record.ended), default=0)
        return self.outcome.gpu_peak_bytes or resident

    def text(self) -> str:
        """A few words on where it stands."""
        if self.is_finished:
            ap = self.outcome.final.get("AP")
            return "done, AP undefined" if ap is None else f"done, AP {ap:.1f}"
        if self.record.problem:
            return f"failed: {self.record.problem}"
        if self.record.attempts:
            return f"begun, {self.outcome.saved_iterations} iterations saved"
        return "to do"


class TrainingProcess:
    """An attempt that is under way: train_net.py, with its output at the end of log_ablate.txt.

    The start of the attempt is on the disk before the process is. It has a process group of its
    own, so that Ctrl-C in a terminal does not reach it: it stops when `stop` asks it to. On Linux
    it is asked to stop, too, when this process dies.

    Args:
        state: of the run before it.
        environment_line: see `Attempt`.
        variables: of the environment, in addition to those of this process.
        held_open: file descriptor that the process keeps as long as it lives.
    """

    def __init__(
        self, state: RunState, environment_line: str, variables: dict[str, str], held_open: int
    ) -> None:
        self.spec = state.spec
        folder = state.spec.folder
        folder.mkdir(parents=True, exist_ok=True)
        started = time_stamp()
        attempt = Attempt(started, environment_line, state.outcome.saved_iterations)
        self._record = state.record.starting(attempt)
        self._record.write(folder)
        self._log = folder / LOG_FILE
        with open(self._log, "ab") as log:
            self._log_start = log.tell()
            self._start = time.monotonic()
            self._process = subprocess.Popen(
                [sys.executable, *training_program(), *state.spec.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **variables},
                pass_fds=(held_open,),
                start_new_session=True,
                preexec_fn=_end_with_parent(),
            )

    def poll(self, asked_to_stop: bool) -> RunState | None:
        """None as long as it runs, then the state of the run, which is on the disk.

        Not to be called again after it has ended.
        """
        pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
        if pid == 0:
            return None
        wall_seconds = time.monotonic() - self._start
        exit_code = os.waitstatus_to_exitcode(status)
        self._process.returncode = exit_code  # so that Popen knows, too
        outcome = read_outcome(self.spec.folder)
        stopped = asked_to_stop and exit_code in (0, -signal.SIGTERM)
        record = self._record.ending(
            AttemptEnd(
                exit_code=exit_code,
                iterations=outcome.saved_iterations,
                wall_seconds=round(wall_seconds, 3),
                cpu_seconds=round(usage.ru_utime + usage.ru_stime, 3),
                # Linux counts in KiB, macOS in bytes.
                peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
                problem=None if outcome.is_finished or stopped else self._problem(exit_code),
            )
        )
        record.write(self.spec.folder)
        return RunState(self.spec, record, outcome)

    def stop(self) -> None:
        """The first call lets the training save, as train_net.py has it; a second one does not."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGTERM)

    def _problem(self, exit_code: int) -> str:
        if exit_code < 0:
            return f"signal {-exit_code} ended it (9 often means a lack of memory)"
        if exit_code == 0:
            return "a signal from elsewhere stopped it; the same command continues it"
        with open(self._log, "rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or ["it said nothing"])[-1]


def training_program() -> list[str]:
    """What Python runs to train: the script of the repository, or, where the package is installed
    without it, the package's own."""
    path = script("train")
    return ["-m", "co_detr", "train"] if path is None else [path]


def _end_with_parent() -> Callable[[], object] | None:
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # loaded here: little is safe between fork and exec
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
