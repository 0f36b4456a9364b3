"""Learning rates by parameter name and by training progress."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from fvcore.common.param_scheduler import ParamScheduler


@dataclass(frozen=True)
class LearningRateFactor:
    """`lr_factor_func` of Detectron2's `get_default_optimizer_params`, as an object, so that
    configs can be saved as YAML and changed from the command line.

    A parameter whose name starts with one of `prefixes` or contains one of `parts` learns with
    `factor` times the base rate, every other one with the base rate. The default slows the
    pretrained backbone down, but not the channel mapper on top of it.
    """

    factor: float = 0.1
    prefixes: Sequence[str] = ("backbone.bottom_up.",)
    parts: Sequence[str] = ("sampling_offsets", "reference_points")

    def __call__(self, name: str) -> float:
        slow = name.startswith(tuple(self.prefixes)) or any(part in name for part in self.parts)
        return self.factor if slow else 1.0


class StepSchedule(ParamScheduler):
    """Multiplies the learning rate by `factor` at each of `drops`, fractions of the training.

    Fractions, unlike iterations, stay right when `train.max_iter` is changed.
    """

    def __init__(self, drops: Sequence[float], factor: float = 0.1) -> None:
        self.drops = sorted(drops)
        self.factor = factor

    def __call__(self, where: float) -> float:
        # The epsilon keeps a drop at iteration 82500 of 90000 from being rounded to 82501.
        return self.factor ** bisect_right(self.drops, where + self.WHERE_EPSILON)


class WarmUp(ParamScheduler):
    """Another schedule behind a linear rise of the learning rate over the first iterations.

    A number of iterations, unlike the fraction that Detectron2's `WarmupParamScheduler` takes,
    stays right when `train.max_iter` is changed: moments of the optimizer need so many steps to
    settle, however long the training is. A training that is shorter ends within the rise.

    Args:
        scheduler: of the whole training, whose rate is multiplied.
        iterations: until the multiplier is 1; 0: no rise.
        max_iter: of the training (``${train.max_iter}``).
        factor: the first multiplier.
    """

    def __init__(
        self, scheduler: ParamScheduler, iterations: int, max_iter: int, factor: float
    ) -> None:
        self.scheduler = scheduler
        self.end = iterations / max_iter
        self.factor = factor

    def __call__(self, where: float) -> float:
        progress = min(where / self.end, 1.0) if self.end > 0 else 1.0
        return (self.factor * (1 - progress) + progress) * self.scheduler(where)
