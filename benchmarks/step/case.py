"""What is computed: the size of the input, the kind of pass and the synthetic images."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

NUM_CLASSES = 80


@dataclass(frozen=True)
class Case:
    """One workload, the same for all contestants.

    Attributes:
        mode: ``train`` is forward and backward, ``inference`` is images in, detections out.
        height, width: of every image in pixels.
        batch: images.
        num_gts: ground truths per image.
        device: ``cpu`` or ``cuda``.
        precision: ``fp32``; ``tf32``, which differs on a GPU alone; or ``bf16`` for autocast (with
            TF32 for what stays in float32).
        with_optimizer: a training step also clips and updates.
    """

    mode: Literal["train", "inference"]
    height: int
    width: int
    batch: int
    num_gts: int = 8
    device: str = "cpu"
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    with_optimizer: bool = False

    @property
    def title(self) -> str:
        kind = "Training step" if self.mode == "train" else "Inference"
        parts = [f"{kind}, {self.batch} x {self.height}x{self.width}", self.device, self.precision]
        if self.mode == "train":
            parts.insert(1, f"{self.num_gts} ground truths per image")
        return ", ".join(parts)

    def autocast(self) -> contextlib.AbstractContextManager:
        enabled = self.precision == "bf16"
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=enabled)

    def set_precision(self) -> None:
        """For the whole process; PyTorch's own choice is TF32 in convolutions and nowhere else."""
        tf32 = self.precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


@dataclass(frozen=True)
class SyntheticImage:
    """Random pixels ``(3, H, W)`` in [0, 255], boxes ``(G, 4)`` absolute xyxy, classes ``(G,)``."""

    pixels: Tensor
    boxes: Tensor
    classes: Tensor


def synthetic_images(case: Case, seed: int = 0) -> list[SyntheticImage]:
    """The batch of ``case``; the same for every process. Boxes are 1/16 to 1/2 of each side."""
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([case.width, case.height], dtype=torch.float32)
    images = []
    for _ in range(case.batch):
        pixels = torch.randint(0, 256, (3, case.height, case.width), generator=generator)
        sides = extent * (1 / 16 + torch.rand(case.num_gts, 2, generator=generator) * 7 / 16)
        low = torch.rand(case.num_gts, 2, generator=generator) * (extent - sides)
        classes = torch.randint(0, NUM_CLASSES, (case.num_gts,), generator=generator)
        images.append(SyntheticImage(pixels.float(), torch.cat([low, low + sides], dim=1), classes))
    return images


class Subject(Protocol):
    """A model with its input; what a worker runs."""

    model: nn.Module

    def loss(self) -> Tensor:
        """Total loss of the batch, with gradients."""

    def detect(self) -> int:
        """Detects in the batch; returns how many boxes were found."""

    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the recipe; the worker sets its learning rate to zero."""
