"""What makes up one optimiser step: its settings, and what is known after its parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepSettings:
    """How one optimiser step is made.

    Attributes:
        device: where the model is ("cpu", "cuda", ..).
        seed: of the model's own randomness (sampling, dropout).
        accumulation_steps: micro-batches per step.
        exact_counts: whether, with several micro-batches, auxiliary heads run once more where they
            could else not count what their losses are divided by in the whole step.
        max_norm: limit of the gradient's L2 norm over all parameters; None: no clipping.
        autocast_dtype: of mixed precision; None: everything in float32.
        max_skips: steps in a row that are skipped because something is NaN or infinite.
        output_dir: where the diagnosis of what is NaN or infinite goes.
    """

    device: str
    seed: int
    accumulation_steps: int = 1
    exact_counts: bool = True
    max_norm: float | None = None
    autocast_dtype: torch.dtype | None = None
    max_skips: int = 0
    output_dir: str = "."


@dataclass
class MicroBatches:
    """What the micro-batches of one iteration add up to in this process."""

    batches: list[list[dict[str, Any]]] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)
    data_time: float = 0.0  # seconds


@dataclass(frozen=True)
class JointResult:
    """What all processes know after the backward pass.

    Attributes:
        losses: mean over processes of each loss term.
        grad_norm: L2 norm before clipping.
        stop: whether any process was asked to stop.
    """

    losses: dict[str, float]
    grad_norm: float
    stop: bool
