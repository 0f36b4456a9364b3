"""Training batches whose content depends on the seed and the iteration only.

Detectron2's loader buffers samples by aspect ratio and lets every worker shard an endless stream,
so the sample that comes next depends on what was loaded before. Here the stream, the grouping and
the split over processes are planned from the images' sizes alone; a plan is cheap to replay, so
training resumes at any iteration exactly, and any number of processes, images at a time or
loading workers sees the same images, augmented the same way, in the same iteration.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from detectron2.data import DatasetFromList
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from co_detr.errors import ConfigError
from co_detr.seeding import locally_seeded, mix_seed
from co_detr.stop_signals import outlive_signals

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleKey:
    """One element of the endless sample stream."""

    position: int  # in the stream; decides the augmentation
    index: int  # of the image in the data set


class BatchPlan(Sampler[list[SampleKey]]):
    """Endless micro-batches of this process, starting at iteration `start_iteration`.

    1. The stream is one shuffle of the data set after the other.
    2. It is cut into batches of `total_batch_size`, each from one group (landscape or portrait,
       which need less padding together) if `groups` is given.
    3. Process r of n takes every n-th sample from the r-th on, `images_per_gpu` at a time.

    Args:
        total_batch_size: images per optimiser step, over all processes and micro-batches.
        images_per_gpu: images of a micro-batch; None: the whole share of the process.

    Attributes:
        accumulation_steps: micro-batches per optimiser step, which follow from the rest.

    Raises:
        ConfigError: if a batch cannot be divided evenly.
    """

    def __init__(
        self,
        size: int,
        total_batch_size: int,
        *,
        seed: int,
        images_per_gpu: int | None = None,
        groups: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if total_batch_size < 1 or total_batch_size % world_size:
            raise ConfigError(
                f"train.effective_batch_size={total_batch_size} cannot be split evenly over "
                f"{world_size} process(es): set it to a multiple of {world_size}, or start another "
                "number of processes."
            )
        share = total_batch_size // world_size
        images_per_gpu = share if images_per_gpu is None else images_per_gpu
        if images_per_gpu < 1 or share % images_per_gpu:
            fitting = [str(n) for n in range(1, share + 1) if share % n == 0]
            raise ConfigError(
                f"train.images_per_gpu={images_per_gpu} does not divide the {share} images that "
                f"each of {world_size} process(es) has of train.effective_batch_size="
                f"{total_batch_size}: set it to {' or '.join(fitting)}."
            )
        self.size = size
        self.total_batch_size = total_batch_size
        self.seed = seed
        self.images_per_gpu = images_per_gpu
        self.accumulation_steps = share // images_per_gpu
        self.groups = groups
        self.rank = rank
        self.world_size = world_size
        self.start_iteration = 0

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for batch in islice(self._batches(), self.start_iteration, None):
            mine = batch[self.rank :: self.world_size]
            for start in range(0, len(mine), self.images_per_gpu):
                yield mine[start : start + self.images_per_gpu]

    def text(self) -> str:
        """How a batch is made, in one line."""
        return (
            f"{self.total_batch_size} images per step: {self.world_size} process(es) x "
            f"{self.accumulation_steps} accumulation step(s) x {self.images_per_gpu} image(s)"
        )

    def state_dict(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "size": self.size,
            "total_batch_size": self.total_batch_size,
        }

    def resume(self, state: dict[str, int], start_iteration: int) -> None:
        """Continues at `start_iteration`; warns if the saved plan had other settings."""
        self.start_iteration = start_iteration
        changed = [key for key, value in self.state_dict().items() if state.get(key) != value]
        if changed:
            logger.warning(
                "Resuming with another %s than the checkpoint was trained with: the order of "
                "the images is not the one of the interrupted run.",
                " and ".join(changed),
            )

    def _batches(self) -> Iterator[list[SampleKey]]:
        groups: dict[int, list[SampleKey]] = {}
        for key in self._stream():
            group = groups.setdefault(0 if self.groups is None else self.groups[key.index], [])
            group.append(key)
            if len(group) == self.total_batch_size:
                yield group.copy()
                group.clear()

    def _stream(self) -> Iterator[SampleKey]:
        generator = torch.Generator().manual_seed(mix_seed("shuffle", self.seed))
        position = 0
        while True:
            for index in torch.randperm(self.size, generator=generator).tolist():
                yield SampleKey(position, index)
                position += 1


class SeededDataset(Dataset[dict[str, Any]]):
    """Maps a `SampleKey` to a mapped sample whose augmentation depends on the key alone."""

    def __init__(
        self,
        records: DatasetFromList,
        mapper: Callable[[dict[str, Any]], dict[str, Any]],
        seed: int,
    ) -> None:
        self.records = records
        self.mapper = mapper
        self.seed = seed

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        with locally_seeded("sample", self.seed, key.position):
            return self.mapper(self.records[key.index])


def build_train_loader(
    dataset: list[dict[str, Any]],
    *,
    mapper: Callable[[dict[str, Any]], dict[str, Any]],
    total_batch_size: int,
    seed: int,
    images_per_gpu: int | None = None,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
) -> DataLoader:
    """Builds the endless loader of this process's micro-batches (lists of mapped dicts).

    Args:
        dataset: dataset dicts with `width` and `height`.
        mapper: what turns a dataset dict into a model input.
        total_batch_size, images_per_gpu: see `BatchPlan`, which the loader's `batch_sampler` is.
        seed: of the order of the images and of their augmentation.
        aspect_ratio_grouping: whether landscape and portrait images are batched apart.
        num_workers: loading processes; 0 loads in this process. Does not change the batches.

    Raises:
        ConfigError: if a batch cannot be divided evenly.
    """
    groups = [int(record["width"] > record["height"]) for record in dataset]
    plan = BatchPlan(
        len(dataset),
        total_batch_size,
        seed=seed,
        images_per_gpu=images_per_gpu,
        groups=groups if aspect_ratio_grouping else None,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
    )
    return DataLoader(
        SeededDataset(DatasetFromList(dataset, copy=False), mapper, seed),
        batch_sampler=plan,
        num_workers=num_workers,
        # A step begins with all of its micro-batches: the workers load them during the one before.
        prefetch_factor=max(2, -(-plan.accumulation_steps // num_workers)) if num_workers else None,
        collate_fn=_keep_list,
        worker_init_fn=outlive_signals,
    )


def _keep_list(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return samples
