"""The best checkpoint, and the end of a training that gains nothing any more."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from detectron2.utils import comm
from omegaconf import DictConfig

from co_detr.checkpoint.saving import Checkpointer
from co_detr.engine.launch import jointly
from co_detr.engine.trainer import Trainer
from co_detr.errors import CheckpointError, ConfigError
from co_detr.files import written_whole

logger = logging.getLogger(__name__)

BEST = "model_best"
HISTORY_FILE = "evaluations.json"
LOSS_PREFIX = "val_loss/"

# COCO's, and LVIS's by frequency of a class; metrics of single classes are AP-<class>.
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")


@dataclass(frozen=True)
class EarlyStop:
    """The node ``train.early_stop``.

    Attributes:
        patience: evaluations in a row without gain that end the training; None: it never ends
            early.
        min_delta: what a metric has to grow by (a loss: fall by) for a gain.

    Raises:
        ConfigError: if a number is out of its range.
    """

    patience: int | None = None
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.patience is not None and not (
            isinstance(self.patience, int) and self.patience >= 1
        ):
            raise ConfigError(
                f"train.early_stop.patience={self.patience} must be a whole number of at least 1, "
                "or null."
            )
        if self.min_delta < 0:
            raise ConfigError(f"train.early_stop.min_delta={self.min_delta} must be at least 0.")


@dataclass
class EvaluationHistory:
    """All evaluations of a run, in a file that is written anew after each.

    It is not a part of checkpoints, which are saved before the evaluation of their iteration.

    Attributes:
        path: the json file: steps done -> metrics.
        metrics: its content.
    """

    path: str
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)

    def read(self, until: int) -> None:
        """Reads what a resumed run has evaluated in its first `until` steps.

        Raises:
            CheckpointError: if the file is damaged.
        """
        if not os.path.exists(self.path):
            return
        try:
            with open(self.path, encoding="utf-8") as file:
                found = {int(steps): dict(each) for steps, each in json.load(file).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.path} is no history of evaluations ({error}): remove it to go on without."
            ) from error
        self.metrics = {steps: each for steps, each in found.items() if steps <= until}

    def forget_earlier_run(self) -> None:
        """Removes the file of the run that has used the folder before."""
        with suppress(FileNotFoundError):
            os.remove(self.path)

    def add(self, steps: int, metrics: Mapping[str, float]) -> None:
        """Notes an evaluation after so many steps; replaces an earlier one of the same steps."""
        self.metrics[steps] = dict(metrics)
        with written_whole(self.path) as file:
            json.dump({str(key): self.metrics[key] for key in sorted(self.metrics)}, file, indent=1)

    def values(self, name: str, until: int | None = None) -> list[tuple[int, float]]:
        """(steps, value) of the evaluations that have the metric, in their order."""
        return [
            (steps, self.metrics[steps][name])
            for steps in sorted(self.metrics)
            if name in self.metrics[steps] and (until is None or steps <= until)
        ]


class ModelSelection:
    """Keeps ``model_best.pth`` and ends the training early, by one metric of the evaluations.

    Only the main process knows metrics; it decides for all.

    Args:
        metric: a key of ``metrics.json``; what begins with ``val_loss/`` is better when lower.
        early_stop: when to end.
        history: of this run.
    """

    def __init__(self, metric: str, early_stop: EarlyStop, history: EvaluationHistory) -> None:
        self.metric = metric
        self.early_stop = early_stop
        self.history = history
        self.sign = -1.0 if metric.startswith(LOSS_PREFIX) else 1.0

    def after_evaluation(
        self, steps: int, metrics: Mapping[str, float], trainer: Trainer, checkpointer: Checkpointer
    ) -> None:
        """Saves if this is the best so far; lowers ``trainer.max_iter`` if it is time to end."""
        jointly(lambda: self._keep_best(steps, metrics, checkpointer))
        if steps < trainer.max_iter and self.exhausted(steps):
            trainer.max_iter = steps

    def exhausted(self, steps: int) -> bool:
        """Whether the patience is at its end after so many steps; the same in all processes."""
        patience = self.early_stop.patience
        if patience is None:
            return False
        values = self._signed(until=steps)
        # Other processes have no history.
        waited = comm.all_gather(evaluations_without_gain(values, self.early_stop.min_delta))[0]
        if waited >= patience:
            logger.info(
                "Early stop after %d steps: %s has not gained in %d evaluations.",
                *(steps, self.metric, waited),
            )
        return waited >= patience

    def _keep_best(
        self, steps: int, metrics: Mapping[str, float], checkpointer: Checkpointer
    ) -> None:
        # An evaluation that is made again may be in the history, but not its checkpoint.
        before = max(self._signed(until=steps - 1), default=None)
        self.history.add(steps, metrics)
        if self.metric not in metrics:
            logger.warning("%s is undefined in this evaluation: it does not count.", self.metric)
            return
        value = metrics[self.metric]
        if before is None or self.sign * value > before:
            logger.info("Best %s so far: %.4g after %d steps.", self.metric, value, steps)
            # Not the last checkpoint: --resume goes on from the newest.
            checkpointer.save(BEST, tag=False, iteration=steps - 1)

    def _signed(self, until: int | None = None) -> list[float]:
        return [self.sign * value for _, value in self.history.values(self.metric, until)]


def evaluations_without_gain(values: Iterable[float], min_delta: float) -> int:
    """How many values at the end do not exceed the best before them by more than `min_delta`."""
    best, waited = None, 0
    for value in values:
        if best is None or value > best + min_delta:
            best, waited = value, 0
        else:
            waited += 1
    return waited


def build_selection(cfg: DictConfig, class_names: Sequence[str]) -> ModelSelection | None:
    """What `train.best_metric` and `train.early_stop` ask for; None: nothing.

    Raises:
        ConfigError: if an evaluation will not have the metric, or a setting is out of its range.
    """
    metric, early_stop = cfg.train.get("best_metric"), EarlyStop(**cfg.train.get("early_stop", {}))
    if metric is None:
        if early_stop.patience is not None:
            raise ConfigError(
                "train.early_stop.patience needs a metric to watch: set train.best_metric=AP."
            )
        return None
    # Checked now: the training would learn of it only at the first evaluation.
    known = [*_METRICS, *([f"{LOSS_PREFIX}total"] if cfg.train.val_loss.enabled else [])]
    if metric not in known and metric not in [f"AP-{name}" for name in class_names]:
        raise ConfigError(
            f"train.best_metric={metric} is no metric of the evaluation: choose "
            f"{', '.join(known)} or AP-<class>, or null for no best checkpoint."
        )
    history = EvaluationHistory(os.path.join(cfg.train.output_dir, HISTORY_FILE))
    return ModelSelection(metric, early_stop, history)
