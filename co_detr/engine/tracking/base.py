"""What experiment trackers share: the run that is tracked, its id on disk, and its scalars."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from detectron2.utils.events import EventWriter, get_event_storage

from co_detr.files import written_whole


class RunFile:
    """Keeps the id of a tracker's run in the output folder.

    Args:
        path: of the file.
        resume: whether to go on with the run of an earlier process.
    """

    def __init__(self, path: str, resume: bool) -> None:
        self.path = path
        self.run_id: str | None = None
        if resume and os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                self.run_id = file.read().strip()

    def keep(self, run_id: str) -> None:
        self.run_id = run_id
        with written_whole(self.path) as file:
            file.write(f"{run_id}\n")


@dataclass(frozen=True)
class TrackedRun:
    """What every tracker is told of a run.

    Attributes:
        output_dir: of the run.
        config: what is worth comparing between runs.
        resume: whether to go on with the run that is kept in the output folder.
        window_size: losses are medians over so many iterations.
    """

    output_dir: str
    config: dict[str, Any]
    resume: bool
    window_size: int

    def run_file(self, tracker: str) -> RunFile:
        """Where the tracker's run id is kept."""
        return RunFile(os.path.join(self.output_dir, f"{tracker}_run.txt"), self.resume)


class ScalarWriter(EventWriter):
    """Passes every scalar on once, smoothed as in `metrics.jsonl`.

    Args:
        window_size: losses are medians over so many iterations.
    """

    def __init__(self, window_size: int) -> None:
        self.window_size = window_size
        self._written: dict[str, int] = {}

    def write(self) -> None:
        by_iteration: dict[int, dict[str, float]] = defaultdict(dict)
        latest = get_event_storage().latest_with_smoothing_hint(self.window_size)
        for name, (value, iteration) in latest.items():
            # By name: an evaluation follows when the losses of its iteration are written already.
            if iteration > self._written.get(name, -1):
                by_iteration[iteration][name] = float(value)
                self._written[name] = iteration
        for iteration in sorted(by_iteration):
            self.log(iteration, by_iteration[iteration])

    @abstractmethod
    def log(self, iteration: int, scalars: dict[str, float]) -> None:
        """Sends the scalars of one iteration."""
