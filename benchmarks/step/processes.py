"""Workers as the benchmark sees them, and the order in which they have their turns."""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field

from benchmarks.common.environment import ROOT
from benchmarks.common.timing import Timing
from benchmarks.step.worker import Setup, Step


class WorkerError(RuntimeError):
    """A worker cannot be built or failed in a step; the message is its last word."""


@dataclass
class Record:
    """All that was measured of one contestant with one allocator; memory in bytes.

    Attributes:
        after_import, after_build: memory before the model was built, and before the first step.
        peak: largest memory since then.
        turns: steps of every round.
    """

    setup: Setup
    after_import: int
    after_build: int
    parameters: int
    peak: int = 0
    turns: list[list[Step]] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str]:
        return self.setup.contestant.name, self.setup.allocator

    @property
    def growth(self) -> int:
        return self.peak - self.after_build

    @property
    def steps(self) -> list[Step]:
        return [step for turn in self.turns for step in turn]

    def median(self, name: str) -> float:
        return statistics.median(getattr(step, name) for step in self.steps)

    def timing(self, part: str = "seconds") -> Timing:
        """Of the step, or its ``forward``, ``backward``, ``optimizer`` or ``cpu_seconds``."""
        return Timing([[getattr(step, part) for step in turn] for turn in self.turns])


class Worker:
    """A process that holds one contestant, which it starts to build at once.

    Raises:
        WorkerError: from `wait` if it cannot be built; so does every turn that fails.
    """

    def __init__(self, setup: Setup, python: str):
        self.setup = setup
        self._log = tempfile.TemporaryFile("w+")
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.step.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                # Threads of a worker that has no turn should sleep, not spin; train_net.py says
                # the same for its own.
                "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
                "TOKENIZERS_PARALLELISM": "false",
            },
        )
        self._send(asdict(setup))

    @property
    def name(self) -> str:
        return f"{self.setup.contestant.name} ({self.setup.allocator} allocator)"

    def wait(self) -> None:
        """Until it is built."""
        self.record = Record(self.setup, **self._receive())

    def turn(self, warm_up: int, steps: int) -> list[Step]:
        self._send({"warm_up": warm_up, "steps": steps})
        reply = self._receive()
        self.record.peak = max(self.record.peak, reply["peak"])
        self.record.turns.append([Step(**step) for step in reply["steps"]])
        return self.record.turns[-1]

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it may have ended already
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _send(self, message: dict) -> None:
        with contextlib.suppress(BrokenPipeError):  # `_receive` says what ended it
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _receive(self) -> dict:
        try:
            reply = json.loads(self._process.stdout.readline() or "null")
        except json.JSONDecodeError:
            reply = None
        if reply is None or "error" in reply:
            self._log.seek(0)
            lines = self._log.read().strip().splitlines()
            self.close()
            code = self._process.returncode
            reason = reply["error"] if reply else f"ended with status {code}: {lines[-1:]}"
            raise WorkerError(reason)
        return reply


def wait_for(workers: list[Worker], failures: dict[str, str]) -> list[Worker]:
    """Those that could be built; reasons of failures by name."""
    built = []
    for worker in workers:
        print(f"building {worker.name}", file=sys.stderr, flush=True)
        try:
            worker.wait()
        except WorkerError as error:
            failures[worker.name] = str(error)
            print(f"  failed: {error}", file=sys.stderr, flush=True)
        else:
            built.append(worker)
    return built


def take_turns(
    workers: list[Worker], rounds: int, warm_up: int, steps: int, failures: dict[str, str]
) -> list[Record]:
    """Gives every worker a turn in each round, in a new random order each.

    A turn starts with untimed steps, because a worker gives its memory back after a turn: all
    together would not fit. A worker that fails leaves, without a record.
    """
    shuffler = random.Random(0)
    order = list(workers)
    for number in range(rounds):
        shuffler.shuffle(order)
        for worker in list(order):
            name = worker.name
            try:
                done = worker.turn(warm_up, steps)
            except WorkerError as error:
                failures[name] = str(error)
                order.remove(worker)
                continue
            seconds = ", ".join(f"{step.seconds:.3f}" for step in done)
            print(f"round {number + 1}/{rounds}: {name} {seconds} s", file=sys.stderr, flush=True)
    survivors = [worker for worker in workers if worker in order]
    for worker in survivors:
        worker.close()
    return [worker.record for worker in survivors]
