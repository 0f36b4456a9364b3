"""Makes the runs of a plan, several at once, until they are done or it is time to stop."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from co_detr.ablation.machine import describe, visible_gpus
from co_detr.ablation.plan import RunSpec
from co_detr.ablation.progress import ProgressBar
from co_detr.ablation.run import Attempting, RunState

_INTERVAL = 0.1  # seconds between two looks at the processes
# Seconds within which signals count as one: a launcher forwards what its group has got already.
_ONE_SIGNAL = 1.0


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
        lock: descriptor that all trainings inherit, see `co_detr.ablation.lock`.
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
        self._running: dict[int, Attempting] = {}  # by place
        self._failed: list[RunState] = []
        self._signals: list[int] = []  # as they arrive
        self._stops_sent = 0

    def run(self) -> Report:
        """Returns when no process is left."""
        end = None
        if self.pace.budget_seconds is not None:
            end = time.monotonic() + self.pace.budget_seconds
        with self._noted_signals(), self._no_orphans(), ProgressBar(self.states.values()) as bar:
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
        left = sum(not state.is_finished for state in self.states.values())
        return Report(self._failed, left, self._signals[0] if self._signals else None)

    def _fill_places(self) -> None:
        for place in range(self.pace.jobs):
            if place not in self._running and self._waiting:
                state = self.states[self._waiting.pop(0)]
                variables = {"OMP_NUM_THREADS": str(self.pace.threads)}
                if self._gpus:
                    variables["CUDA_VISIBLE_DEVICES"] = self._gpus[place % len(self._gpus)]
                self._running[place] = Attempting(state, self._environment, variables, self._lock)

    def _stop_running(self, times: int) -> None:
        while self._stops_sent < times:
            self._stops_sent += 1
            for attempting in self._running.values():
                attempting.process.stop()

    def _collect(self, bar: ProgressBar) -> None:
        for place, attempting in list(self._running.items()):
            state = attempting.poll(asked_to_stop=self._stops_sent > 0)
            if state is None:
                continue
            del self._running[place]
            self.states[state.spec] = state
            if state.record.problem and not state.is_finished:
                self._failed.append(state)
            bar.ended(state)
            self.after_run()

    @contextlib.contextmanager
    def _no_orphans(self) -> Iterator[None]:
        """If this process fails, as on a full disk, trainings save and stop, too."""
        try:
            yield
        finally:
            for attempting in self._running.values():
                attempting.process.stop()

    @contextlib.contextmanager
    def _noted_signals(self) -> Iterator[None]:
        last = -_ONE_SIGNAL

        def note(number: int, frame: FrameType | None) -> None:
            nonlocal last
            if time.monotonic() - last >= _ONE_SIGNAL:
                self._signals.append(number)
            last = time.monotonic()

        before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
