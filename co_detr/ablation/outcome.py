"""What the folder of a training says about it: progress, evaluations, speed, GPU memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from co_detr.checkpoint.saving import FINAL, MARKER
from co_detr.engine.selection import HISTORY_FILE
from co_detr.engine.trainer import GPU_PEAK

_NUMBERED = re.compile(r"model_(\d+)\.pth")


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
            (each[metric] for each in self.evaluations.values() if metric in each), default=None
        )


def read_outcome(folder: Path) -> Outcome:
    """Reads a folder, which may be missing or of a run that is not at its end."""
    marker = _text(folder / MARKER).strip("\0 \n")
    records = list(_log(folder / "metrics.jsonl"))
    trained = max((each["iteration"] + 1 for each in records if "total_loss" in each), default=0)
    evaluations = _evaluations(folder / HISTORY_FILE)
    numbered = _NUMBERED.fullmatch(marker)
    saved = trained if marker == FINAL else int(numbered[1]) + 1 if numbered else 0
    times = [each["time"] for each in records if "time" in each]
    memory = [each[GPU_PEAK] for each in records if GPU_PEAK in each]
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
