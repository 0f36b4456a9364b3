"""Makes the runs of a plan, several at once, until they are done or it is time to stop."""

from __future__ import annotations

import fcntl
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm

from co_detr.errors import ConfigError
from co_detr.tools.ablate.grid import RunSpec
from co_detr.tools.ablate.run import RunState, TrainingProcess

_INTERVAL = 0.1  # seconds between two looks at the processes

# Seconds within which signals count as one: a launcher forwards what its group has got already.
_ONE_SIGNAL = 1.0

_LOCK_FILE = ".ablate.lock"


@dataclass(frozen=True)
class Pace:
    """How runs share the machine.

    Attributes:
        jobs: at once.
        threads: of each.
        budget_seconds: after which running trainings save and stop; None: no limit.
    """

    jobs: int
    threads: int
    budget_seconds: float | None = None


@dataclass(frozen=True)
class Report:
    """What a call has come to.

    Attributes:
        failed: runs that ended before their end without being asked to.
        left: runs that are not finished, failed ones among them.
        signal_number: of the signal that asked for the stop, if one did.
    """

    failed: list[RunState]
    left: int
    signal_number: int | None


class Runner:
    """Runs what is not finished, in the order of the plan, each once.

    GPUs, if there are any, are given to the `jobs` places in turn.

    Args:
        specs: the plan.
        pace: how.
        after_run: called when a process has ended and its record is written.
        lock: descriptor that all trainings inherit, see `exclusive`.
    """

    def __init__(
        self, specs: Sequence[RunSpec], pace: Pace, after_run: Callable[[], None], lock: int
    ) -> None:
        self.states = {spec: RunState.read(spec) for spec in specs}
        self.pace = pace
        self.after_run = after_run
        self._lock = lock
        self._environment = describe(pace.jobs, pace.threads)
        self._gpus = visible_gpus()
        self._waiting = [spec for spec in specs if not self.states[spec].is_finished]
        self._running: dict[int, TrainingProcess] = {}  # by place
        self._failed: list[RunState] = []
        self._signals: list[int] = []  # as they arrive
        self._stops_sent = 0

    def run(self) -> Report:
        """Returns when no process is left."""
        end = None
        if self.pace.budget_seconds is not None:
            end = time.monotonic() + self.pace.budget_seconds
        with self._noted_signals(), ProgressBar(self.states.values()) as bar:
            try:
                while True:
                    over = end is not None and time.monotonic() >= end
                    # Each further signal is passed on: the second one ends trainings at once.
                    self._stop_running(max(len(self._signals), int(over)))
                    if not self._stops_sent and not over and not self._signals:
                        self._fill_places()
                    if not self._running:
                        break
                    self._collect(bar)
                    time.sleep(_INTERVAL)
                    bar.show(len(self._running))
            finally:
                # If this process fails, as on a full disk, trainings save and stop, too.
                for process in self._running.values():
                    process.stop()
        left = sum(not state.is_finished for state in self.states.values())
        return Report(self._failed, left, self._signals[0] if self._signals else None)

    def _fill_places(self) -> None:
        for place in range(self.pace.jobs):
            if place not in self._running and self._waiting:
                state = self.states[self._waiting.pop(0)]
                variables = {"OMP_NUM_THREADS": str(self.pace.threads)}
                if self._gpus:
                    variables["CUDA_VISIBLE_DEVICES"] = self._gpus[place % len(self._gpus)]
                self._running[place] = TrainingProcess(
                    state, self._environment, variables, self._lock
                )

    def _stop_running(self, times: int) -> None:
        while self._stops_sent < times:
            self._stops_sent += 1
            for process in self._running.values():
                process.stop()

    def _collect(self, bar: ProgressBar) -> None:
        for place, process in list(self._running.items()):
            state = process.poll(asked_to_stop=self._stops_sent > 0)
            if state is None:
                continue
            del self._running[place]
            self.states[state.spec] = state
            if state.record.problem and not state.is_finished:
                self._failed.append(state)
            bar.ended(state)
            self.after_run()

    @contextmanager
    def _noted_signals(self) -> Iterator[None]:
        last = -_ONE_SIGNAL

        def note(number: int, frame: FrameType | None) -> None:
            nonlocal last
            if time.monotonic() - last >= _ONE_SIGNAL:
                self._signals.append(number)
            last = time.monotonic()

        before = {stop: signal.signal(stop, note) for stop in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for stop, handler in before.items():
                signal.signal(stop, handler)


class ProgressBar:
    """Counts finished runs and shows the best AP among them; a context manager.

    Args:
        states: of all runs of the plan.
    """

    def __init__(self, states: Iterable[RunState]) -> None:
        states = list(states)
        self._best: tuple[float, str] | None = None
        tqdm.monitor_interval = 0  # its thread would be in the way of forks
        self._bar = tqdm(
            total=len(states),
            initial=sum(state.is_finished for state in states),
            unit="run",
            miniters=0,  # the time goes on between two runs
            mininterval=1 if sys.stderr.isatty() else 60,  # a log file need not hold every second
        )
        for state in states:
            self._consider(state)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def ended(self, state: RunState) -> None:
        """Prints a line about a run whose process has ended."""
        self._consider(state)
        self._bar.write(f"{state.spec.title}: {_line(state)}")
        self._bar.update(int(state.is_finished))

    def show(self, running: int) -> None:
        """Brings the bar up to date, if it is time for that."""
        parts = [f"{running} running"]
        if self._best is not None:
            parts.append(f"best AP {self._best[0]:.1f} ({self._best[1]})")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update(0)

    def _consider(self, state: RunState) -> None:
        ap = state.outcome.final.get("AP") if state.is_finished else None
        if ap is not None and (self._best is None or ap > self._best[0]):
            self._best = (ap, state.spec.title)


def _line(state: RunState) -> str:
    parts = [state.text()]
    best = state.outcome.best("AP")
    if state.is_finished and best is not None:
        parts.append(f"best {best:.1f}")
    parts.append(f"{state.wall_seconds / 60:.1f} min")
    return ", ".join(parts)


def visible_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES of the GPUs that this process may use."""
    if not torch.cuda.is_available():
        return []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen:
        return [name.strip() for name in chosen.split(",")]
    return [str(number) for number in range(torch.cuda.device_count())]


def describe(jobs: int, threads: int) -> str:
    """One line: software, processor, cores, GPUs, and how trainings share them."""
    parts = [f"torch {torch.__version__}", f"{_processor()}, {os.cpu_count()} cores"]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        parts.append(f"{len(names)} x {names[0]}")
    parts.append(f"{jobs} at once with {threads} thread(s) each")
    return "; ".join(parts)


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@contextmanager
def exclusive(output_dir: Path) -> Iterator[int]:
    """Yields a descriptor of a lock, which is free when all processes that have it have ended.

    Trainings outlive an ablate.py that is killed; no other may be started in their folders.

    Raises:
        ConfigError: if it is not free.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / _LOCK_FILE, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"trainings of another call still write to {output_dir}: wait until they end, or "
                "choose another --output-dir."
            ) from None
        yield file.fileno()
