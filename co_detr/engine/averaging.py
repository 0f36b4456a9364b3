"""Exponential moving average (EMA) of the weights, which evaluates better than the last ones."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from detectron2.engine import HookBase
from omegaconf import DictConfig
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from co_detr.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmaSettings:
    """The node ``train.ema``.

    Attributes:
        enabled: whether weights are averaged.
        decay: share of the average that stays in a step, in the long run.
        warmup_iterations: steps in which the decay grows to 63 % of that; 0: it is constant.
            Otherwise the first, bad weights would stay in the average for 1 / (1 - decay) steps.

    Raises:
        ConfigError: if a number is out of its range.
    """

    enabled: bool = False
    decay: float = 0.9997
    warmup_iterations: int = 2000

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"train.ema.decay={self.decay} must be at least 0 and below 1.")
        if self.warmup_iterations < 0:
            raise ConfigError(
                f"train.ema.warmup_iterations={self.warmup_iterations} must be at least 0."
            )


class AveragedWeights(AveragedModel):
    """torch's `AveragedModel` with a decay that warms up. Buffers are copied, not averaged.

    Its state in a checkpoint (`n_averaged`, `module.*`) is all that it continues from.

    Args:
        model: not wrapped for several processes; all of them make the same average.
        settings: of the decay.
    """

    def __init__(self, model: nn.Module, settings: EmaSettings) -> None:
        super().__init__(model)
        self.settings = settings
        self.requires_grad_(False).eval()

    def decay(self) -> float:
        """Of the next step."""
        warmup, steps = self.settings.warmup_iterations, int(self.n_averaged)
        grown = 1 - math.exp(-steps / warmup) if warmup else 1.0
        return self.settings.decay * grown

    def start_from(self, model: nn.Module) -> None:
        """To be called when the weights are loaded: without a step, the average is the model."""
        if self.n_averaged == 0:
            self.module.load_state_dict(model.state_dict())

    def update_parameters(self, model: nn.Module) -> None:
        self.multi_avg_fn = get_ema_multi_avg_fn(self.decay())
        super().update_parameters(model)


class EmaHook(HookBase):
    """Updates the average after every optimiser step; before hooks that save or evaluate."""

    def __init__(self, averaged: AveragedWeights, model: nn.Module) -> None:
        self.averaged = averaged
        self.model = model

    def before_train(self) -> None:
        if self.trainer.start_iter > 0 and self.averaged.n_averaged == 0:
            logger.warning(
                "The checkpoint has no averaged weights: the average starts from its weights."
            )

    def after_step(self) -> None:
        self.averaged.update_parameters(self.model)


def build_averaged(model: nn.Module, cfg: DictConfig) -> AveragedWeights | None:
    """The average that `train.ema` asks for; None: it asks for none."""
    settings = EmaSettings(**cfg.train.get("ema", {}))
    return AveragedWeights(model, settings) if settings.enabled else None
