"""One run of the plan: its state, how it is started, and what it gave."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from datetime import datetime

from co_detr.ablation.outcome import Outcome, read_outcome
from co_detr.ablation.plan import RunSpec
from co_detr.ablation.process import ProcessEnd, TrainingProcess
from co_detr.ablation.record import Attempt, AttemptEnd, RunRecord, read_record


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


class Attempting:
    """An attempt that is under way; its start is on the disk before the process is.

    Args:
        state: of the run before it.
        environment_line: see `Attempt`.
        variables: of the environment of the process.
        held_open: see `TrainingProcess`.
    """

    def __init__(
        self, state: RunState, environment_line: str, variables: dict[str, str], held_open: int
    ) -> None:
        self.spec = state.spec
        folder = state.spec.folder
        folder.mkdir(parents=True, exist_ok=True)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        attempt = Attempt(started, environment_line, state.outcome.saved_iterations)
        self._record = state.record.starting(attempt)
        self._record.write(folder)
        self.process = TrainingProcess(state.spec.arguments, folder, variables, held_open)

    def poll(self, asked_to_stop: bool) -> RunState | None:
        """None as long as it runs, then the state of the run, which is on the disk."""
        end = self.process.poll()
        if end is None:
            return None
        outcome = read_outcome(self.spec.folder)
        stopped = asked_to_stop and end.exit_code in (0, -signal.SIGTERM)
        problem = None if outcome.is_finished or stopped else self._problem(end)
        record = self._record.ending(
            AttemptEnd(
                exit_code=end.exit_code,
                iterations=outcome.saved_iterations,
                wall_seconds=round(end.wall_seconds, 3),
                cpu_seconds=round(end.cpu_seconds, 3),
                peak_bytes=end.peak_bytes,
                problem=problem,
            )
        )
        record.write(self.spec.folder)
        return RunState(self.spec, record, outcome)

    def _problem(self, end: ProcessEnd) -> str:
        if end.exit_code < 0:
            return f"signal {-end.exit_code} ended it (9 often means a lack of memory)"
        if end.exit_code == 0:
            return "a signal from elsewhere stopped it; the same command continues it"
        return self.process.last_words()
