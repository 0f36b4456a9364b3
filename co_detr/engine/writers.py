"""What a run writes while it trains: a progress line, metrics.jsonl, TensorBoard events."""

from __future__ import annotations

import datetime
import glob
import json
import logging
import os
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventWriter, get_event_storage

from co_detr.engine.setup import METRICS_FILE
from co_detr.files import INCOMPLETE, written_whole

logger = logging.getLogger(__name__)

# Of the names of what an evaluation logs: metrics of boxes and of masks, losses on the val set.
EVALUATION_PREFIXES = ("bbox/", "segm/", "val_loss/")


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


class ProgressPrinter(EventWriter):
    """One short line: Detectron2's printer lists every loss term, of which Co-DETR has dozens.

    Terms are added up by the part of their name before the first dot (the query group or head).
    """

    def __init__(self, max_iter: int, window_size: int) -> None:
        self.max_iter = max_iter
        self.window_size = window_size
        self._written = -1

    def write(self) -> None:
        storage = get_event_storage()
        _, iteration = storage.latest().get("total_loss", (None, -1))
        if iteration <= self._written:
            return  # only an evaluation is new
        self._written = iteration
        done = iteration + 1
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


class MetricsWriter(ScalarWriter):
    """A line of json for each iteration that has something new; on the disk when it returns.

    An evaluation, which is known later than the losses of its iteration, joins them in their line.
    """

    def __init__(self, path: str, window_size: int) -> None:
        super().__init__(window_size)
        self.path = path
        *_, last = ["{}", *_lines(path)]
        self.last: dict[str, float] = json.loads(last)

    def log(self, iteration: int, scalars: dict[str, float]) -> None:
        joins = self.last.get("iteration") == iteration
        self.last = {**(self.last if joins else {}), **scalars, "iteration": iteration}
        line = json.dumps(self.last, sort_keys=True) + "\n"
        if joins:
            with written_whole(self.path) as file:
                file.writelines([*_lines(self.path)[:-1], line])
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


class TensorBoardWriter(ScalarWriter):
    """TensorBoard's event file.

    Args:
        start_iter: a TensorBoard that is open forgets what it has read from there on.
    """

    def __init__(self, output_dir: str, window_size: int, start_iter: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(window_size)
        self.writer = SummaryWriter(output_dir, purge_step=start_iter or None)

    def log(self, iteration: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, iteration)
        self.writer.flush()  # what has a checkpoint has its log

    def close(self) -> None:
        self.writer.close()


class WriterHook(HookBase):
    """Writes every `period` iterations, and what an iteration has before its evaluation.

    Belongs before hooks that save checkpoints: what has a checkpoint has its log. In processes that
    do not write it has no writers.

    Args:
        period: iterations between two lines.
        eval_period: iterations between two evaluations; 0: only at the end.
    """

    def __init__(self, period: int, eval_period: int) -> None:
        self.periods = [period] + ([eval_period] if eval_period > 0 else [])
        self.writers: list[EventWriter] = []

    def open(self, writers: list[EventWriter]) -> None:
        """To be called when the run may change its folder."""
        self.writers = writers

    def after_step(self) -> None:
        steps = self.trainer.iter + 1
        if steps == self.trainer.max_iter or any(steps % period == 0 for period in self.periods):
            self.write()

    def write(self) -> None:
        for writer in self.writers:
            writer.write()

    def close(self) -> None:
        """Writes what is new, and closes all; to be called however the training ends."""
        while self.writers:
            writer = self.writers.pop(0)
            writer.write()
            writer.close()


def build_writers(
    output_dir: str,
    start_iter: int,
    max_iter: int,
    log_period: int,
    repeat_evaluation: bool = False,
) -> list[EventWriter]:
    """Progress line, `metrics.jsonl` and, if TensorBoard is installed, its event file.

    Losses are medians over the last `log_period` iterations. What the files have from `start_iter`
    on is removed: an interrupted run wrote it after its last checkpoint, and the iterations are
    done again. With `repeat_evaluation`, so is the evaluation of the iteration before.
    """

    def stays(name: str, iteration: int) -> bool:
        again = repeat_evaluation and iteration == start_iter - 1 and is_evaluation(name)
        return iteration < start_iter and not again

    metrics_file = os.path.join(output_dir, METRICS_FILE)
    _purge_metrics(metrics_file, stays)
    writers: list[EventWriter] = [
        ProgressPrinter(max_iter, log_period),
        MetricsWriter(metrics_file, log_period),
    ]
    if find_spec("tensorboard") is not None:
        purge_events(output_dir, stays)
        writers.append(TensorBoardWriter(output_dir, log_period, start_iter))
    return writers


def is_evaluation(name: str) -> bool:
    """Whether a scalar comes from an evaluation, and not from a training step."""
    return name.startswith(EVALUATION_PREFIXES)


def _lines(path: str) -> list[str]:
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return file.readlines()


def _purge_metrics(path: str, stays: Callable[[str, int], bool]) -> None:
    kept = []
    for line in _lines(path):
        try:
            scalars = json.loads(line)
        except json.JSONDecodeError:
            break  # a run that was killed can leave half a line at the end
        left = {name: value for name, value in scalars.items() if name != "iteration"}
        left = {name: value for name, value in left.items() if stays(name, scalars["iteration"])}
        if left:
            line = json.dumps({**left, "iteration": scalars["iteration"]}, sort_keys=True)
            kept.append(f"{line}\n")
    with written_whole(path) as file:
        file.writelines(kept)


def purge_events(folder: str, stays: Callable[[str, int], bool]) -> None:
    """Removes scalars from the event files of a folder, and files that then have none.

    Args:
        stays: (name, iteration) -> whether the scalar is kept.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "events.out.tfevents.*"))):
        if path.endswith(INCOMPLETE):
            continue
        kept, scalars, changed = [], 0, False
        for record in RawEventFileLoader(path).Load():  # ends where a killed run has ended
            event = Event.FromString(record)
            names = [value.tag for value in event.summary.value]
            if all(stays(name, event.step) for name in names):
                kept.append(record)
                scalars += len(names)
            else:
                changed = True
        if not scalars:
            os.remove(path)
        elif changed:
            with written_whole(path, "wb") as file:
                records = RecordWriter(file)
                for record in kept:
                    records.write(record)
                records.flush()
