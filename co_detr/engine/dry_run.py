"""A few training steps on made-up images, to learn what a run needs before it starts.

No image is read and nothing is written.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import detectron2.data.transforms as T
import torch
from detectron2.config import instantiate
from detectron2.engine import HookBase
from detectron2.utils import comm
from omegaconf import DictConfig

from co_detr.data.loader import BatchPlan
from co_detr.engine.complexity import random_batch
from co_detr.engine.hooks import EmaHook, build_averaged
from co_detr.engine.memory import PeakMemory
from co_detr.engine.out_of_memory import explain_out_of_memory, training_advice
from co_detr.engine.run import build_model, build_trainer
from co_detr.errors import ConfigError

MANY_OBJECTS = 100  # per image; COCO's fullest has 93
USUAL_OBJECTS = 8
# Gradients of one micro-batch lie in memory while the second one is computed; a third adds nothing.
_ACCUMULATED = 2
_WORST_STEPS = 2  # the optimiser makes its state at the end of the first

Size = tuple[int, int]


@dataclass(frozen=True)
class ImageSizes:
    """(height, width) in pixels that an augmentation gives: the largest, and a usual one."""

    largest: Size
    usual: Size


@dataclass(frozen=True)
class DryRun:
    """What was measured.

    Attributes:
        plan: how a batch is made.
        sizes: of the images.
        peak: of the process that needed most.
        worst_seconds: of a step whose images all are of the largest size.
        usual_seconds: of a step with images of the usual size.
        max_iter: steps of the run.
    """

    plan: BatchPlan
    sizes: ImageSizes
    peak: PeakMemory
    worst_seconds: float
    usual_seconds: float
    max_iter: int

    def text(self) -> str:
        (worst_height, worst_width), (height, width) = self.sizes.largest, self.sizes.usual
        whole = datetime.timedelta(seconds=round(self.usual_seconds * self.max_iter))
        return "\n".join(
            [
                self.plan.text(),
                f"peak memory:  {self.peak} ({worst_height}x{worst_width}, {MANY_OBJECTS} objects "
                "per image, optimiser step included)",
                f"largest step: {self.worst_seconds:.4g} s",
                f"usual step:   {self.usual_seconds:.4g} s ({height}x{width}, {USUAL_OBJECTS} "
                "objects per image)",
                f"whole run:    {whole} for {self.max_iter} usual steps, without evaluations and "
                "waiting for images",
            ]
        )


def dry_run(cfg: DictConfig) -> DryRun:
    """Trains for three steps; to be called in every process that takes part in the run.

    Of a step with more than two micro-batches two are computed, and the time is scaled.

    Raises:
        OutOfMemoryError: if a step does not fit.
        ConfigError: if the augmentation does not limit the size of images.
    """
    node = cfg.dataloader.train
    plan = BatchPlan(
        size=node.total_batch_size,
        total_batch_size=node.total_batch_size,
        images_per_gpu=node.images_per_gpu,
        seed=cfg.train.seed,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
    )
    sizes = image_sizes(instantiate(node.mapper.augmentations))
    turned = not node.get("aspect_ratio_grouping", True)
    steps = min(_ACCUMULATED, plan.accumulation_steps)
    loader = MadeUpLoader(
        [
            *_micro_batches(
                sizes.largest, turned, plan, MANY_OBJECTS, cfg.model, _WORST_STEPS * steps
            ),
            *_micro_batches(sizes.usual, turned, plan, USUAL_OBJECTS, cfg.model, steps),
        ]
    )
    clock = StepClock(cfg.train.device)
    with explain_out_of_memory(
        cfg.train.device, "a step of the dry run", lambda: training_advice(cfg, plan)
    ):
        model = build_model(cfg)
        trainer = build_trainer(cfg, model, loader, steps)
        averaged = build_averaged(model, cfg)
        trainer.register_hooks([None if averaged is None else EmaHook(averaged, model), clock])
        trainer.train(0, _WORST_STEPS + 1)
    scale = plan.accumulation_steps / steps
    peaks = comm.all_gather(PeakMemory.of(cfg.train.device))
    return DryRun(
        plan,
        sizes,
        peak=max(peaks, key=lambda peak: peak.used),
        worst_seconds=clock.seconds[_WORST_STEPS - 1] * scale,
        usual_seconds=clock.seconds[-1] * scale,
        max_iter=cfg.train.max_iter,
    )


def image_sizes(augmentations: Sequence[T.Augmentation]) -> ImageSizes:
    """Follows the sizes through the augmentations; those that change none, or only sometimes, pass.

    Raises:
        ConfigError: if no step limits both sides.
    """
    largest = usual = None
    for step in augmentations:
        if isinstance(step, T.ResizeShortestEdge):
            edges = sorted(step.short_edge_length)
            largest = (edges[-1], max(step.max_size, edges[-1]))
            edge = edges[len(edges) // 2]
            usual = (edge, min(round(edge * 4 / 3), step.max_size))
        elif isinstance(step, T.ResizeScale):
            largest = usual = tuple(
                round(side * step.max_scale) for side in (step.target_height, step.target_width)
            )
        elif isinstance(step, T.Resize):
            largest = usual = tuple(step.shape)
        elif isinstance(step, T.RandomCrop) and step.crop_type == "absolute" and largest:
            largest, usual = (tuple(map(min, size, step.crop_size)) for size in (largest, usual))
    if largest is None or max(largest) >= sys.maxsize:
        raise ConfigError(
            "the augmentation does not limit the size of images: set "
            "dataloader.train.mapper.augmentations.max_size."
        )
    return ImageSizes(largest, usual)


class MadeUpLoader:
    """Iterates over micro-batches; stands in for the training loader."""

    def __init__(self, batches: list[list[dict[str, Any]]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return iter(self.batches)


class StepClock(HookBase):
    """Measures the seconds of every step."""

    def __init__(self, device: str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.start = 0.0
        self.seconds: list[float] = []

    def before_step(self) -> None:
        self.start = self._now()

    def after_step(self) -> None:
        self.seconds.append(self._now() - self.start)

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


def _micro_batches(
    size: Size, turned: bool, plan: BatchPlan, num_gts: int, model: DictConfig, number: int
) -> list[list[dict[str, Any]]]:
    """The same micro-batch `number` times; with `turned`, every second image is upright, so that
    padding makes the batch as large as it can become."""
    sizes = [size[::-1] if turned and i % 2 else size for i in range(plan.images_per_gpu)]
    batch = [
        random_batch(height, width, 1, num_gts, model.num_classes, seed=i)[0]
        for i, (height, width) in enumerate(sizes)
    ]
    return [batch] * number
