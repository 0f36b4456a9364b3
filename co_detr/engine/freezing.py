"""Parts of a model that a training leaves as they are, chosen by names (``train.freeze``).

A frozen parameter has no gradient, and so no place in the optimizer: no moments, no weight decay.
Layers whose parameters are all frozen compute as in evaluation, without dropout and with the
statistics that they have. Where nothing in front of them learns either, nothing is kept for a
backward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from detectron2.engine import HookBase
from torch import nn

from co_detr.errors import ConfigError

logger = logging.getLogger(__name__)

_MARK = "frozen_by_config"


@dataclass(frozen=True)
class Frozen:
    """What patterns have frozen.

    Attributes:
        parts: the layers that compute as in evaluation, none inside of another.
        counts: parameters (numbers, not tensors) that each pattern has frozen, without those of
            patterns before it.
        trained: parameters that are left to learn.
    """

    parts: tuple[str, ...]
    counts: dict[str, int]
    trained: int

    def text(self) -> str:
        """Two lines for the log."""
        counts = ", ".join(
            f"{pattern} ({count / 1e6:.1f} M)" for pattern, count in self.counts.items()
        )
        parts = ", ".join(self.parts) or "none"
        return (
            f"Frozen: {sum(self.counts.values()) / 1e6:.1f} M parameters of {counts}; "
            f"{self.trained / 1e6:.1f} M are trained.\nComputing as in evaluation: {parts}"
        )


def freeze(model: nn.Module, patterns: Sequence[str]) -> Frozen:
    """Freezes what `patterns` name, and marks layers for `keep_frozen_in_eval`.

    To be called before the optimizer is built and the average is copied.

    Args:
        patterns: names of parameters as of ``model.named_parameters()``, with ``*``, ``?`` and
            ``[..]`` of a shell, in which ``*`` goes over dots, too. A part of the model stands for
            all that is in it.

    Raises:
        ConfigError: if a pattern names nothing, or nothing is left to learn.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: set[str] = set()
    counts = {}
    for pattern in patterns:
        matched = {name for name in parameters if _names(pattern, name)}
        if not matched:
            raise ConfigError(
                f"train.freeze names {pattern!r}, which is no parameter of the model: "
                f"{_nearest(pattern, parameters)}."
            )
        counts[pattern] = _number(parameters[name] for name in matched - names)
        names |= matched
    for name in names:
        parameters[name].requires_grad_(False)
    trained = _number(value for value in parameters.values() if value.requires_grad)
    if not trained:
        raise ConfigError(
            "train.freeze leaves nothing to learn: remove patterns from it, or evaluate with "
            "--eval-only."
        )
    parts = []
    for name, module in model.named_modules():
        inside = [f"{name}.{own}" for own, _ in module.named_parameters()]
        if name and inside and names.issuperset(inside):
            if not any(name.startswith(f"{part}.") for part in parts):
                parts.append(name)
                setattr(module, _MARK, True)
    return Frozen(tuple(parts), counts, trained)


def _names(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _number(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in set(parameters))


def _nearest(pattern: str, parameters: dict[str, nn.Parameter]) -> str:
    parts = {
        ".".join(name.split(".")[:length])
        for name in parameters
        for length in range(1, name.count(".") + 2)
    }
    close = get_close_matches(pattern.removesuffix(".*"), sorted(parts), n=1, cutoff=0.5)
    tops = ", ".join(dict.fromkeys(name.split(".")[0] for name in parameters))
    return f"did you mean {close[0]}" if close else f"the model consists of {tops}"


def keep_frozen_in_eval(model: nn.Module) -> None:
    """Puts the layers that `freeze` has marked, or a copy of them, back after ``model.train()``."""
    for module in model.modules():
        if getattr(module, _MARK, False):
            module.eval()


class FrozenHook(HookBase):
    """Keeps frozen layers in evaluation mode, which the end of every evaluation changes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def before_step(self) -> None:
        keep_frozen_in_eval(self.model)
