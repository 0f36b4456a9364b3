"""What a run writes while it trains: a progress line, metrics.jsonl, TensorBoard events."""

from __future__ import annotations

import datetime
import json
import logging
import os
from importlib.util import find_spec

import torch
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter, get_event_storage

from co_detr.files import written_whole

logger = logging.getLogger(__name__)


class ProgressPrinter(EventWriter):
    """One short line: Detectron2's printer lists every loss term, of which Co-DETR has dozens.

    Terms are added up by the part of their name before the first dot (the query group or head).
    """

    def __init__(self, max_iter: int, window_size: int) -> None:
        self.max_iter = max_iter
        self.window_size = window_size

    def write(self) -> None:
        storage = get_event_storage()
        done = storage.iter + 1
        if done > self.max_iter or "total_loss" not in storage.histories():
            return  # called once more after the last iteration
        groups: dict[str, float] = {}
        for name in storage.histories():
            if "." in name and "/" not in name:
                group = name.split(".")[0]
                groups[group] = groups.get(group, 0.0) + self._median(name)
        terms = [f"loss {self._median('total_loss'):.4g}"]
        if len(groups) > 1:
            parts = ", ".join(f"{name} {value:.4g}" for name, value in groups.items())
            terms[0] += f" ({parts})"
        terms.append(f"grad {self._median('grad_norm'):.3g}")
        if "lr" in storage.histories():
            terms.append(f"lr {storage.history('lr').latest():.3g}")
        eta = ""
        if "time" in storage.histories():  # measured from the third iteration on
            seconds = storage.history("time").median(1000)
            eta = f"  eta {datetime.timedelta(seconds=int(seconds * (self.max_iter - done)))}"
            data = self._median("data_time")
            terms.append(f"{seconds:.3g} s/it (data {data:.2g})")
        if torch.cuda.is_available():
            terms.append(f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
        percent = 100 * done // self.max_iter
        logger.info("iter %d/%d %d%%%s  %s", done, self.max_iter, percent, eta, "  ".join(terms))

    def _median(self, name: str) -> float:
        storage = get_event_storage()
        samples = max(1, storage.count_samples(name, self.window_size))
        return storage.history(name).median(samples)


def build_writers(
    output_dir: str, start_iter: int, max_iter: int, log_period: int
) -> list[EventWriter]:
    """Progress line, `metrics.jsonl` and, if TensorBoard is installed, its event file.

    Losses are medians over the last `log_period` iterations. Lines of `metrics.jsonl` from
    `start_iter` on are removed: an interrupted run wrote them after its last checkpoint, and
    the iterations are done again.
    """
    metrics_file = os.path.join(output_dir, "metrics.jsonl")
    _drop_lines_from(metrics_file, start_iter)
    writers: list[EventWriter] = [
        ProgressPrinter(max_iter, log_period),
        JSONWriter(metrics_file, window_size=log_period),
    ]
    if find_spec("tensorboard") is not None:
        writers.append(TensorboardXWriter(output_dir, window_size=log_period))
    return writers


def _drop_lines_from(metrics_file: str, start_iter: int) -> None:
    if not os.path.exists(metrics_file):
        return
    kept = []
    with open(metrics_file, encoding="utf-8") as file:
        for line in file:
            try:
                iteration = json.loads(line)["iteration"]
            except json.JSONDecodeError:
                break  # a run that was killed can leave half a line at the end
            if iteration < start_iter:
                kept.append(line)
    with written_whole(metrics_file) as file:
        file.writelines(kept)
