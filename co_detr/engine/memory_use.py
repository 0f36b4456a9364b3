"""Memory that a run needs: measured in a dry run before it starts, explained where it runs out.

A dry run makes a few training steps on made-up images, which also tells the time of a step. No
image is read and nothing is written.
"""

from __future__ import annotations

import datetime
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import detectron2.data.transforms as T
import torch
from detectron2.config import instantiate
from detectron2.engine import HookBase
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from co_detr.data.loader import BatchPlan
from co_detr.engine.config import channels_of, learns_masks
from co_detr.engine.hooks import EmaHook, build_averaged
from co_detr.engine.setup import build_model
from co_detr.engine.trainer import build_trainer
from co_detr.errors import ConfigError, OutOfMemoryError

MANY_OBJECTS = 100  # per image; COCO's fullest has 93
USUAL_OBJECTS = 8
# Gradients of one micro-batch lie in memory while the second one is computed; a third adds nothing.
_ACCUMULATED = 2
_WORST_STEPS = 2  # the optimizer makes its state at the end of the first
Size = tuple[int, int]
# What allocators say: CUDA's caching allocator, CUDA itself, cuBLAS, and PyTorch's on the CPU.
_MESSAGES = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",
    "not enough memory",
)
CHECKPOINTING = (
    "model.encoder.activation_checkpointing",
    "model.backbone.bottom_up.activation_checkpointing",
)
_MASKS_OF_IMAGE = "model.mask_head.sampler.max_positives"
_TRAIN_SIZES = (
    "model.padding.square_size",
    "dataloader.train.mapper.augmentations.size",
    "dataloader.train.mapper.augmentations.max_size",
)
_TEST_SIZES = ("model.padding.square_size", "dataloader.test.mapper.augmentations.max_size")


@dataclass(frozen=True)
class PeakMemory:
    """The most memory that was in use so far.

    Attributes:
        used: bytes. On a GPU what PyTorch has reserved there, on the CPU the resident memory of
            this process with all its libraries (without processes that load images).
        total: bytes that the GPU or the machine has.
    """

    used: int
    total: int

    @classmethod
    def of(cls, device: str | torch.device) -> PeakMemory:
        device = torch.device(device)
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            return cls(torch.cuda.max_memory_reserved(device), total)
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return cls(used, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def __str__(self) -> str:
        return f"{self.used / 2**30:.2f} of {self.total / 2**30:.2f} GiB"


@contextmanager
def explain_out_of_memory(device: str, doing: str, advice: Callable[[], str]) -> Iterator[None]:
    """Turns a failed allocation inside the block into one sentence.

    Args:
        device: where the model is.
        doing: what the block does, as in "training".
        advice: gives what to change.

    Raises:
        OutOfMemoryError: instead of what PyTorch or Python raise.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        where = "the GPU" if device.startswith("cuda") else "the machine"
        raise OutOfMemoryError(
            f"the memory of {where} ran out in {doing} (peak: {PeakMemory.of(device)}): {advice()}."
        ) from error


def training_advice(cfg: DictConfig, plan: BatchPlan) -> str:
    """Switches that save memory in training and are not on yet, the cheapest first."""
    advice = []
    share = plan.images_per_gpu
    if share > 1:
        smaller = max(n for n in range(1, share) if share % n == 0)
        advice.append(
            f"set train.images_per_gpu={smaller} (now {share}; the batch of a step and the "
            "learning rate stay)"
        )
    if not cfg.train.amp.enabled:
        advice.append("set train.amp.enabled=true (bfloat16)")
    off = [key for key in CHECKPOINTING if OmegaConf.select(cfg, key) is False]
    advice += [f"set {key}=true" for key in off]
    if (masks := OmegaConf.select(cfg, _MASKS_OF_IMAGE)) and masks > 1:
        advice.append(f"learn fewer masks of an image: set {_MASKS_OF_IMAGE}={masks // 2}")
    advice.append(_smaller_images(cfg, _TRAIN_SIZES))
    return f"{' or '.join(advice)}, and try it with --dry-run"


def evaluation_advice(cfg: DictConfig) -> str:
    """The same for evaluation, which keeps nothing for a backward pass."""
    size = cfg.dataloader.test.get("batch_size", 1)
    advice = ["set dataloader.test.batch_size=1"] if size > 1 else []
    return " or ".join([*advice, _smaller_images(cfg, _TEST_SIZES)])


def _smaller_images(cfg: DictConfig, keys: tuple[str, ...]) -> str:
    for key in keys:
        if value := OmegaConf.select(cfg, key):
            return f"choose smaller images ({key} is {value})"
    return "choose smaller images"


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or any(message in text for message in _MESSAGES)


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
                "per image, optimizer step included)",
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
    masks, channels = learns_masks(model), channels_of(model)
    batch = [
        random_batch(
            *(height, width, 1, num_gts, model.num_classes),
            seed=i,
            masks=masks,
            channels=channels,
        )[0]
        for i, (height, width) in enumerate(sizes)
    ]
    return [batch] * number


def random_batch(
    height: int,
    width: int,
    batch: int,
    num_gts: int,
    num_classes: int,
    seed: int = 0,
    masks: bool = False,
    channels: int = 3,
) -> list[dict]:
    """Inputs with random pixels and boxes, ready for training and for inference.

    Returns:
        ``batch`` dicts: ``image`` ``(channels, height, width)`` float from 0 to 255, ``instances``
        with ``num_gts`` ``gt_boxes`` (absolute xyxy) and ``gt_classes``; with ``masks`` also
        ``gt_masks`` that fill the boxes.
    """
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([width, height], dtype=torch.float32)
    inputs = []
    for _ in range(batch):
        sides = extent * (0.1 + 0.4 * torch.rand(num_gts, 2, generator=generator))
        low = torch.rand(num_gts, 2, generator=generator) * (extent - sides)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([low, low + sides], dim=1))
        instances.gt_classes = torch.randint(0, num_classes, (num_gts,), generator=generator)
        if masks:
            bitmaps = torch.zeros(num_gts, height, width, dtype=torch.bool)
            for bitmap, box in zip(bitmaps, instances.gt_boxes.tensor.int().tolist(), strict=True):
                bitmap[box[1] : box[3] + 1, box[0] : box[2] + 1] = True
            instances.gt_masks = BitMasks(bitmaps)
        image = 255 * torch.rand(channels, height, width, generator=generator)
        inputs.append({"image": image, "instances": instances})
    return inputs
