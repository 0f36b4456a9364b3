"""The process of one contestant: builds it, then does a turn of steps on every command.

Commands and replies are lines of JSON on stdin and stdout: a ``Setup`` first, then any number of
``{"warm_up": n, "steps": n}``. Only one worker has a turn at a time; the others block in a read.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from torch import nn

from benchmarks.common.environment import ROOT
from benchmarks.step.case import Case, Subject
from benchmarks.step.contestants import Contestant
from benchmarks.step.memory import MemoryMeter, Usage, give_back_memory

MAX_GRAD_NORM = 0.1


@dataclass(frozen=True)
class Setup:
    """What a worker is told first; ``allocator`` is "default" or "tuned"."""

    contestant: Contestant
    case: Case
    allocator: str
    threads: int

    @classmethod
    def from_json(cls, text: str) -> Setup:
        fields = json.loads(text)
        fields["contestant"] = Contestant(**fields["contestant"])
        fields["case"] = Case(**fields["case"])
        return cls(**fields)


@dataclass(frozen=True)
class Step:
    """Measurements of one step: seconds of its parts, and what it used of the machine."""

    forward: float
    backward: float
    optimizer: float
    cpu_seconds: float
    kernel_seconds: float
    page_faults: int
    result: float  # loss, or number of detections

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.optimizer


class Runner:
    """Runs steps of a subject and measures them."""

    def __init__(self, subject: Subject, case: Case):
        self.subject = subject
        self.case = case
        self.optimizer = None
        if case.mode == "inference":
            subject.model.eval()
            return
        subject.model.train()
        if case.with_optimizer:
            self.optimizer = subject.optimizer()
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0  # costs the same, and every step computes the same

    def step(self) -> Step:
        torch.manual_seed(0)  # the same proposals and queries are drawn in every step
        before = Usage.now()
        stopwatch = Stopwatch(self.case.device)
        stopwatch.mark()
        if self.case.mode == "inference":
            with torch.inference_mode(), self.case.autocast():
                result = float(self.subject.detect())
            for _ in range(3):  # all of it is forward
                stopwatch.mark()
        else:
            self.subject.model.zero_grad(set_to_none=True)
            with self.case.autocast():
                loss = self.subject.loss()
            stopwatch.mark()
            loss.backward()
            stopwatch.mark()
            if self.optimizer is not None:
                nn.utils.clip_grad_norm_(self.subject.model.parameters(), MAX_GRAD_NORM)
                self.optimizer.step()
            stopwatch.mark()
            result = loss.item()
        if not math.isfinite(result):
            raise FloatingPointError(f"the loss is {result}")
        forward, backward, optimizer = stopwatch.seconds()
        used = Usage.now().since(before)
        return Step(forward, backward, optimizer, **asdict(used), result=result)


class Stopwatch:
    """Seconds between marks; on CUDA by events, so that marks do not make the host wait."""

    def __init__(self, device: str):
        self.on_cuda = device == "cuda"
        self.marks: list[float | torch.cuda.Event] = []
        if self.on_cuda:
            torch.cuda.synchronize()  # what came before is not part of the first section

    def mark(self) -> None:
        if not self.on_cuda:
            self.marks.append(time.perf_counter())
            return
        self.marks.append(torch.cuda.Event(enable_timing=True))
        self.marks[-1].record()

    def seconds(self) -> list[float]:
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not self.on_cuda:
            return [after - before for before, after in pairs]
        self.marks[-1].synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


def tune_allocator() -> bool:
    """The same setting for all contestants; by path, as peers may lack this project's packages."""
    path = Path(ROOT, "co_detr", "process_setup.py")
    spec = spec_from_file_location("process_setup", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.keep_freed_memory()


def import_package(root: str) -> None:
    """Makes ``co_detr`` the package of the checkout at ``root``, whichever is on Python's path."""
    folder = Path(root, "co_detr")
    spec = spec_from_file_location(
        "co_detr", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["co_detr"] = package = module_from_spec(spec)
    spec.loader.exec_module(package)


def subject_class(contestant: Contestant) -> Callable[[Contestant, Case], Subject]:
    """Imports what the contestant needs, and nothing else."""
    if contestant.kind == "transformers":
        from benchmarks.peers.transformers_subject import TransformersSubject

        return TransformersSubject
    import_package(contestant.root)
    from benchmarks.step.co_detr_subject import CoDETRSubject

    return CoDETRSubject


def serve(read_line: Callable[[], str], reply: Callable[[dict], None]) -> None:
    """Obeys commands until stdin ends."""
    setup = Setup.from_json(read_line())
    torch.set_num_threads(setup.threads)
    tuned = setup.allocator == "tuned" and tune_allocator()
    if setup.allocator == "tuned" and not tuned:
        raise RuntimeError("the allocator cannot be tuned here; use --allocator default")
    meter = MemoryMeter(setup.case.device)
    make_subject = subject_class(setup.contestant)
    after_import = meter.current()
    runner = Runner(make_subject(setup.contestant, setup.case), setup.case)
    setup.case.set_precision()  # a config of this project has its own
    after_build = meter.current()
    meter.reset_peak()
    parameters = sum(p.numel() for p in runner.subject.model.parameters())
    reply({"after_import": after_import, "after_build": after_build, "parameters": parameters})
    while line := read_line():
        command = json.loads(line)
        for _ in range(command["warm_up"]):
            runner.step()
        steps = [runner.step() for _ in range(command["steps"])]
        peak = meter.peak()
        runner.subject.model.zero_grad(set_to_none=True)
        give_back_memory(setup.case.device)
        reply({"steps": [asdict(step) for step in steps], "peak": peak})


def main() -> None:
    # Libraries print to stdout: the replies get a descriptor of their own.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(message: dict) -> None:
        channel.write(json.dumps(message) + "\n")

    try:
        serve(sys.stdin.readline, reply)
    except Exception as error:  # the parent reports it and goes on with the others
        traceback.print_exc()
        reply({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
