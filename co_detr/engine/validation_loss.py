"""The training losses on the val set, without any trace in the model or in the randomness."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

from co_detr.data.coco import class_names
from co_detr.engine.selection import LOSS_PREFIX
from co_detr.engine.setup import pin_for
from co_detr.engine.trainer import StepSettings
from co_detr.errors import ConfigError
from co_detr.seeding import locally_seeded, seed_everything

TOTAL = f"{LOSS_PREFIX}total"

# In eval mode these neither draw random numbers nor gather statistics.
_KEPT_IN_EVAL = (_BatchNorm, _DropoutNd, StochasticDepth)


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
        if self.max_images is not None and self.max_images < 1:
            raise ConfigError(
                f"train.val_loss.max_images={self.max_images} must be at least 1, or null."
            )


class ValidationLoss:
    """Mean over images of every loss term, each image by itself and under a seed of its own.

    The model computes as in training but for batch norms, which use their statistics, and
    dropout and drop paths, which are off. Images are resized as in the evaluation. With several
    processes the losses are normalised over the images that these compute at the same time.

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
        # All processes have equally many, as losses are normalised together; the surplus repeats
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
        means = {f"{LOSS_PREFIX}{name}": each / self.num_images for name, each in totals.items()}
        return {**means, TOTAL: sum(means.values())}


class ValidationSet:
    """Records of data.val with the categories as its own file numbers them.

    Loading registers these categories, so it has to come before the evaluation is built, which
    lets `align_classes` change what is registered.
    """

    def __init__(self, cfg: DictConfig, max_images: int | None) -> None:
        self.test = copy.deepcopy(cfg.dataloader.test)
        # A loss of masks needs them here, too; the evaluation, which has the same node, does not.
        train = cfg.dataloader.train
        if train.dataset.get("with_masks", False):
            self.test.dataset.with_masks = True
        if train.mapper.get("use_instance_mask", False):
            self.test.mapper.use_instance_mask = True
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
        for module in modes:
            if isinstance(module, _KEPT_IN_EVAL):
                module.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
