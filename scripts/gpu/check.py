#!/usr/bin/env python3
"""Runs the stages of `check_gpu.sh`: each with a time limit, whatever became of the others."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from scripts.gpu.stages import Figures, Stage, gpu_stages, rehearsal_stages

ROOT = Path(__file__).resolve().parents[2]
SHOWN_LINES = 12  # of the output of a stage that failed
GRACE = 5  # seconds between asking a stage to end and ending it


@dataclass
class Outcome:
    """What became of a stage."""

    stage: str
    status: str  # passed, failed, timed out, left out, not run
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)
    note: str = ""

    @property
    def is_good(self) -> bool:
        return self.status in ("passed", "left out")


class Running:
    """A stage that was started; its output goes to a file of its own until it has ended."""

    def __init__(self, stage: Stage, folder: Path, limit: float) -> None:
        self.stage = stage
        self.path = folder / f".{stage.name}.part"
        self.start = time.monotonic()
        self.deadline = self.start + limit
        self.timed_out = False
        with self.path.open("wb") as file:
            self.process = subprocess.Popen(
                list(stage.command),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | stage.environment,
                start_new_session=True,  # so that its children end with it
            )

    def poll(self) -> Outcome | None:
        """The outcome, once it has ended or its time is over."""
        if self.process.poll() is None and time.monotonic() < self.deadline:
            return None
        if self.process.poll() is None:
            self.timed_out = True
        self.end()
        return self._outcome()

    def end(self) -> None:
        """Ends it with all that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break  # nothing is left of it
            try:
                self.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()

    def _outcome(self) -> Outcome:
        seconds = time.monotonic() - self.start
        output = self.path.read_text(errors="replace")
        code = self.process.returncode
        status = "timed out" if self.timed_out else "failed" if code else "passed"
        outcome = Outcome(self.stage.name, status, round(seconds, 1), note=self.stage.note)
        if status == "failed":
            outcome.note = f"exit status {code}"
        try:
            outcome.figures = self.stage.figures(output)
        except Exception as error:  # a report must not end for what one stage has printed
            if status == "passed":
                outcome.status = "failed"
            outcome.note = f"its figures cannot be read ({type(error).__name__}: {error})"
        if not outcome.is_good:
            print("\n".join(output.splitlines()[-SHOWN_LINES:]), flush=True)
        return outcome


class Check:
    """Runs groups of stages, keeps the summary on disk up to date, and prints it last."""

    def __init__(self, stages: Sequence[Stage], out: Path, minutes: float, at_once: bool) -> None:
        self.stages = stages
        self.out = out
        self.end = time.monotonic() + 60 * minutes
        self.at_once = at_once
        self.outcomes: list[Outcome] = []
        self.log = out / "log.txt"
        out.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")

    def run(self) -> int:
        for group in sorted({stage.group for stage in self.stages}):
            stages = [stage for stage in self.stages if stage.group == group]
            for together in [stages] if self.at_once else [[stage] for stage in stages]:
                self._run_group(together)
        order = [stage.name for stage in self.stages]
        self.outcomes.sort(key=lambda outcome: order.index(outcome.stage))
        self._write()
        print(f"\n{table(self.outcomes)}\n\nResults and logs: {self.out}", flush=True)
        return 0 if all(outcome.is_good for outcome in self.outcomes) else 1

    def _run_group(self, stages: Sequence[Stage]) -> None:
        running: list[Running] = []
        try:
            for stage in stages:
                left = self.end - time.monotonic()
                if stage.command is None:
                    self._add(Outcome(stage.name, "left out", note=stage.note))
                elif left < GRACE:
                    self._add(Outcome(stage.name, "not run", note="no time was left"))
                else:
                    print(f"{stage.name} ...", flush=True)
                    running.append(Running(stage, self.out, min(stage.limit, left)))
            while running:
                for process in list(running):
                    outcome = process.poll()
                    if outcome is not None:
                        running.remove(process)
                        self._keep_output(process)
                        self._add(outcome)
                time.sleep(0.1)
        finally:
            for process in running:  # whoever runs this wants it to end
                process.end()
                self._keep_output(process)

    def _keep_output(self, running: Running) -> None:
        """One file for all: machines are lent that give few files back."""
        command = " ".join(running.stage.command)
        with self.log.open("a") as log:
            log.write(f"\n##### {running.stage.name}: {command}\n\n")
            log.write(running.path.read_text(errors="replace"))
        running.path.unlink()

    def _add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(f"{outcome.stage}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
        self._write()

    def _write(self) -> None:
        content = {"stages": [asdict(outcome) for outcome in self.outcomes]}
        (self.out / "summary.json").write_text(json.dumps(content, indent=2) + "\n")


def table(outcomes: Sequence[Outcome]) -> str:
    """One line for a stage, and below it one for each three of its figures."""
    lines = [f"{'stage':<13} {'status':<10} {'seconds':>7}  key figures", "-" * 78]
    for outcome in outcomes:
        figures = [f"{name}: {value}" for name, value in outcome.figures.items()]
        rows = [", ".join(figures[i : i + 3]) for i in range(0, len(figures), 3)]
        rows = ([outcome.note] if outcome.note else []) + rows or [""]
        lines.append(f"{outcome.stage:<13} {outcome.status:<10} {outcome.seconds:>7.1f}  {rows[0]}")
        lines += [f"{'':<33} {row}" for row in rows[1:]]
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="check_gpu.sh", description="Builds, tests and measures on a machine with a GPU."
    )
    add = parser.add_argument
    add("--rehearse", action="store_true", help="at tiny sizes on the CPU, to see that all works")
    add("--minutes", type=float, help="for all of it (default: 8; of a rehearsal, 20)")
    add("--only", nargs="+", metavar="STAGE", help="these stages; --list names them")
    add("--list", action="store_true", help="name the stages and end")
    add(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or ROOT / "output" / "check_gpu"),
        help="results and logs (default: $OUT, or output/check_gpu)",
    )
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    if options.minutes is None:
        # Machines with a GPU are lent by the minute; a rehearsal is only not to hang.
        options.minutes = 20.0 if options.rehearse else 8.0
    make = rehearsal_stages if options.rehearse else gpu_stages
    options.stages = make(options.out, os.environ.get("DATA"))
    names = [stage.name for stage in options.stages]
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if options.only:
        options.stages = [stage for stage in options.stages if stage.name in options.only]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.list:
        print("\n".join(stage.name for stage in options.stages))
        return 0
    # So that stages end, and the log is complete, when somebody ends this.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    return Check(options.stages, options.out, options.minutes, not options.rehearse).run()


if __name__ == "__main__":
    sys.exit(main())
