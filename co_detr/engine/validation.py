"""What a training takes from its val set beside metrics: losses, the best checkpoint, when to end.

Losses are computed without any trace in the model or in the randomness.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data import DatasetFromList, DatasetMapper, MapDataset
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader
from torchvision.ops import StochasticDepth

from co_detr.checkpoint.saving import Checkpointer
from co_detr.data.coco_classes import class_names
from co_detr.data.coco_file import read_coco
from co_detr.engine.config import learns_masks
from co_detr.engine.evaluation import MASKS, missing_masks, usable_dataset
from co_detr.engine.freezing import keep_frozen_in_eval
from co_detr.engine.launch import jointly
from co_detr.engine.setup import pin_for
from co_detr.engine.trainer import StepSettings, Trainer
from co_detr.errors import CheckpointError, ConfigError, require_whole
from co_detr.files import written_whole
from co_detr.modeling.detectors import TTA_KIND
from co_detr.seeding import locally_seeded, seed_everything

logger = logging.getLogger(__name__)

# In eval mode these neither draw random numbers nor gather statistics.
_KEPT_IN_EVAL = (_BatchNorm, _DropoutNd, StochasticDepth)
BEST = "model_best"
HISTORY_FILE = "evaluations.json"
LOSS_PREFIX = "val_loss/"
TOTAL = f"{LOSS_PREFIX}total"
# COCO's, and LVIS's by frequency of a class; metrics of single classes are AP-<class>.
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")


@dataclass(frozen=True)
class ValidationLossSettings:
    """The node ``train.val_loss``.

    Attributes:
        enabled: whether the losses are computed at every evaluation.
        max_images: so many images, evenly spread over the val set; None: all.

    Raises:
        ConfigError: if the number is out of its range.
    """

    enabled: bool = False
    max_images: int | None = None

    def __post_init__(self) -> None:
        require_whole("train.val_loss.max_images", self.max_images, or_null="for all")


class ValidationLoss:
    """Mean over images of every loss term, each image by itself and under a seed of its own.

    The model computes as in training but for batch norms, which use their statistics, and
    dropout and drop paths, which are off. Images are resized as in the evaluation. With several
    processes the losses are normalized over the images that these compute at the same time.

    Args:
        records: dataset dicts of the val set with `annotations`.
        mapper: of the evaluation; its `is_train` is set, so that annotations are kept.
        settings: of a training step: seed, device and precision.
        num_workers: loading processes.
    """

    def __init__(
        self,
        records: list[dict[str, Any]],
        mapper: DatasetMapper,
        settings: StepSettings,
        num_workers: int = 0,
    ) -> None:
        mapper.is_train = True
        self.settings = settings
        rank, world_size = comm.get_rank(), comm.get_world_size()
        # All processes have equally many, as losses are normalized together; the surplus repeats
        # the first images and does not count.
        rounds = -(-len(records) // world_size)
        self.indices = [index * world_size + rank for index in range(rounds)]
        self.num_images = len(records)
        loader = DataLoader(
            MapDataset(DatasetFromList(records, copy=False), mapper),
            sampler=[index % len(records) for index in self.indices],
            batch_size=1,
            num_workers=num_workers,
            collate_fn=list,
            generator=torch.Generator(),  # starting a loader draws from it
        )
        self.loader = pin_for(loader, settings.device)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """``val_loss/<term>`` and ``val_loss/total``; the same in all processes."""
        sums: dict[str, float] = {}
        dtype = self.settings.autocast_dtype
        device = torch.device(self.settings.device)
        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
        # The storage takes what heads log about themselves.
        with training_without_trace(model, device), EventStorage(), torch.no_grad(), autocast:
            for index, batch in zip(self.indices, self.loader, strict=True):
                seed_everything("validation loss", self.settings.seed, index)
                losses = model(batch)
                if index < self.num_images:
                    for name, loss in losses.items():
                        sums[name] = sums.get(name, 0.0) + loss.float()
        sums = {name: float(total) for name, total in sums.items()}
        totals: dict[str, float] = {}
        for part in comm.all_gather(sums):
            for name, value in part.items():
                totals[name] = totals.get(name, 0.0) + value
        means = {f"{LOSS_PREFIX}{name}": total / self.num_images for name, total in totals.items()}
        return {**means, TOTAL: sum(means.values())}


class ValidationSet:
    """Records of data.val with the categories as its own file numbers them.

    Loading registers these categories, so it has to come before the evaluation is built, which
    lets `align_classes` change what is registered.
    """

    def __init__(self, cfg: DictConfig, max_images: int | None) -> None:
        self.test = copy.deepcopy(cfg.dataloader.test)
        # A loss of masks needs them here, too; the evaluation, which has the same node, does not.
        if validates_masks(cfg):
            self.test.dataset.with_masks = True
        records = instantiate(self.test.dataset)
        number = min(max_images or len(records), len(records))
        self.records = [records[index * len(records) // number] for index in range(number)]
        self.names = class_names(cfg.data.val)

    def build_loss(self, names: Sequence[str], settings: StepSettings) -> ValidationLoss:
        """For a model whose classes are `names`, trained with `settings`."""
        numbers = [list(names).index(name) for name in self.names]
        for record in self.records:
            for annotation in record["annotations"]:
                annotation["category_id"] = numbers[annotation["category_id"]]
        mapper = instantiate(self.test.mapper)
        return ValidationLoss(self.records, mapper, settings, self.test.num_workers)


def validates_masks(cfg: DictConfig) -> bool:
    """Whether the losses of `train.val_loss` are also those of masks, which data.val then needs."""
    reads_masks = cfg.dataloader.train.dataset.get("with_masks", False)
    enabled = cfg.train.get("val_loss", {}).get("enabled", False)
    return bool(enabled and reads_masks and learns_masks(cfg.model))


def load_validation_set(cfg: DictConfig) -> ValidationSet | None:
    """What `train.val_loss` asks for; None: nothing."""
    settings = ValidationLossSettings(**cfg.train.get("val_loss", {}))
    return ValidationSet(cfg, settings.max_images) if settings.enabled else None


@contextmanager
def training_without_trace(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Training mode without side effects inside; modes and generators as before behind it."""
    modes = {module: module.training for module in model.modules()}
    devices = [device] if device.type == "cuda" else []
    with locally_seeded("validation loss"), torch.random.fork_rng(devices):
        model.train()
        keep_frozen_in_eval(model)
        for module in modes:
            if isinstance(module, _KEPT_IN_EVAL):
                module.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


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
        require_whole("train.early_stop.patience", self.patience, or_null="")
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
                found = {int(steps): dict(metrics) for steps, metrics in json.load(file).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.path} is no history of evaluations ({error}): remove it to go on without."
            ) from error
        self.metrics = {steps: metrics for steps, metrics in found.items() if steps <= until}

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


def build_selection(
    cfg: DictConfig, class_names: Sequence[str], predicts_masks: bool, kinds: Sequence[str]
) -> ModelSelection | None:
    """What `train.best_metric` and `train.early_stop` ask for; None: nothing.

    Args:
        predicts_masks: whether the model does.
        kinds: of detections that evaluations report beside the decoder's.

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
    kind, _, of_kind = metric.partition("/")
    own = of_kind if kind in kinds else metric
    of_masks = own.startswith(f"{MASKS}/")
    # Of the kinds, only test-time augmentation keeps masks.
    has_masks = predicts_masks and (kind not in kinds or kind == TTA_KIND)
    name = own.removeprefix(f"{MASKS}/") if has_masks else own
    losses = [TOTAL] if cfg.train.val_loss.enabled else []
    of_class = [f"AP-{class_name}" for class_name in class_names]
    if name not in (*_METRICS, *of_class) and metric not in losses:
        before = [f"{prefix}/" for prefix in ([MASKS] if predicts_masks else []) + list(kinds)]
        remark = f" or {', '.join(before)} before one of these," if before else ""
        why = "; this model predicts no masks" if of_masks and not predicts_masks else ""
        raise ConfigError(
            f"train.best_metric={metric} is no metric of the evaluation{why}: choose "
            f"{', '.join([*_METRICS, *losses])} or AP-<class>,{remark} or null for no best "
            "checkpoint."
        )
    if of_masks:
        val = usable_dataset(read_coco(cfg.data.val), with_masks=True)
        problem = missing_masks(cfg.data.val, val)
        if problem is not None:
            raise ConfigError(f"train.best_metric={metric}: {problem}")
    history = EvaluationHistory(os.path.join(cfg.train.output_dir, HISTORY_FILE))
    return ModelSelection(metric, early_stop, history)
