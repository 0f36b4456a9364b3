"""Kills a training with SIGKILL at random moments, resumes it each time, and looks at what is left.

    python -m tests.engine.kill_and_resume --kills 20

Exits with 1 if a checkpoint could not be read after a kill, or if the final weights, the state of
the optimizer or the log differ from those of a run that was left alone.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from co_detr.checkpoint.saving import MARKER, problem_of
from co_detr.engine.validation import HISTORY_FILE
from co_detr.files import INCOMPLETE
from tests.engine.processes import TrainNet
from tests.engine.tiny_data import make_tiny_data

# Everything that has a state: dropout, the moments of AdamW, the scale of float16, the schedule.
SETTINGS = [
    "train.checkpointer.period=1",
    "train.checkpointer.max_to_keep=3",
    "train.amp.enabled=true",
    "train.amp.dtype=float16",
    "model.dropout=0.3",
    "lr_multiplier.drops=[0.5]",
    "train.eval_period=9",
]
_EVALUATES = "Start inference on"


@dataclass
class Result:
    """What happened.

    Attributes:
        moments: how many kills hit the start, an iteration, an evaluation, or a file that was being
            written.
        problems: sentences on what is wrong; empty if all is well.
    """

    moments: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def kill_and_resume(root: Path, kills: int, iterations: int, seed: int = 0) -> Result:
    """Trains in `root`/whole without and in `root`/parts with interruptions."""
    data = make_tiny_data(root)
    whole, parts = root / "whole", root / "parts"
    settings = [*SETTINGS, f"train.max_iter={iterations}"]
    left_alone = TrainNet([*data.overrides(whole), *settings])
    result = Result()
    if left_alone.wait() != 0:
        result.problems.append(f"the run that was left alone failed: {left_alone.output}")
        return result

    chance = random.Random(seed)
    while sum(result.moments.values()) < kills:
        run = TrainNet([*data.overrides(parts), *settings, "--resume"])
        moment = _kill(run, parts, chance)
        if moment is None:
            result.problems.append(f"a run ended before it was killed: {run.output}")
            return result
        result.moments[moment] += 1
        result.problems += _unreadable(parts)
    last = TrainNet([*data.overrides(parts), *settings, "--resume"])
    if last.wait() != 0:
        result.problems.append(f"the last run failed: {last.output}")
        return result
    result.problems += _differences(whole, parts)
    return result


def _kill(run: TrainNet, folder: Path, chance: random.Random) -> str | None:
    """Kills the run somewhere; returns where, or None if it ended by itself."""
    where = chance.choice(["start", "iteration", "evaluation", "save", "save"])
    before, left_before = _last(folder), _incomplete(folder)
    if where == "start":
        time.sleep(chance.uniform(0, 0.5))
    else:
        run.wait_until(lambda: _last(folder) != before)
        if where == "evaluation":
            done = run.output.count(_EVALUATES)
            run.wait_until(lambda: run.output.count(_EVALUATES) > done, interval=0)
        time.sleep(chance.uniform(0, 0.05 if where == "evaluation" else 0.2))
        if where == "save":
            run.wait_until(lambda: bool(_incomplete(folder) - left_before), interval=0)
    if not run.is_running:
        return None
    run.send(signal.SIGKILL)
    run.kill()
    if _incomplete(folder) - left_before:
        return "while writing"
    if where == "evaluation":
        return where
    return "start" if _last(folder) == before else "iteration"


def _last(folder: Path) -> str:
    marker = folder / MARKER
    return marker.read_text() if marker.exists() else ""


def _incomplete(folder: Path) -> set[tuple[str, int]]:
    """Names of half-written files, and which file it is that has the name."""
    if not folder.is_dir():
        return set()
    entries = [entry for entry in os.scandir(folder) if entry.name.endswith(INCOMPLETE)]
    return {(entry.name, entry.inode()) for entry in entries}


def _unreadable(folder: Path) -> list[str]:
    files = list(folder.glob("model_*.pth"))
    problems = [f"{path} {problem_of(str(path))}" for path in files if problem_of(str(path))]
    if files and not (folder / _last(folder)).is_file():
        problems.append(f"{MARKER} names {_last(folder)!r}")
    return problems


def _differences(whole: Path, parts: Path) -> list[str]:
    problems = []
    expected, actual = (torch.load(folder / "model_final.pth") for folder in (whole, parts))
    for key in ("model", "trainer", "iteration"):
        if not _equal(expected[key], actual[key]):
            problems.append(f"{key} of model_final.pth differs")
    best = [torch.load(folder / "model_best.pth") for folder in (whole, parts)]
    if best[0]["iteration"] != best[1]["iteration"] or not _equal(
        *(checkpoint["model"] for checkpoint in best)
    ):
        problems.append("model_best.pth differs")
    if _log(whole) != _log(parts):
        problems.append("metrics.jsonl differs")
    for name in (HISTORY_FILE, "metrics.json", "coco_instances_results.json"):
        if (whole / name).read_text() != (parts / name).read_text():
            problems.append(f"{name} differs")
    if tensorboard_events(whole) != tensorboard_events(parts):
        problems.append("the TensorBoard events differ")
    if left := _incomplete(parts):
        problems.append(f"still there: {left}")
    return problems


def _equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


def _log(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if "time" not in key and "eta" not in key}
        for line in lines
    ]


def tensorboard_events(folder: Path) -> list[tuple[str, int, float]]:
    """All scalars in the event files, as they lie there, without times."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            for value in event.summary.value:
                found.append((value.tag, event.step, value.simple_value))
    return sorted(line for line in found if "time" not in line[0] and "eta" not in line[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        result = kill_and_resume(Path(root), options.kills, options.iterations, options.seed)
    print(f"{sum(result.moments.values())} kills in {time.monotonic() - start:.0f} s", end=": ")
    print(", ".join(f"{number} {moment}" for moment, number in result.moments.items()))
    print("\n".join(result.problems) or "no difference, no unreadable checkpoint")
    return int(bool(result.problems))


if __name__ == "__main__":
    sys.exit(main())
