"""Finds the config that a state dict belongs to, by names and shapes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from co_detr.checkpoint.official import misfits, rename_official
from co_detr.checkpoint.official_table import NO_AUXILIARY
from co_detr.errors import CheckpointError
from co_detr.model_zoo.configs import get_config
from co_detr.model_zoo.table import ZOO

# Any decoder layer's class head tells the number of classes.
CLASS_BIAS = {True: "query_head.cls_branches.0.bias", False: "decoder.class_heads.0.bias"}


@dataclass(frozen=True)
class Choice:
    """A config that fits.

    Attributes:
        name: of the model in the zoo.
        num_classes: of the state dict, which may differ from the config's.
        same: other models whose tensors have the same names and shapes.
    """

    name: str
    num_classes: int
    same: list[str]


def empty_model(cfg: DictConfig) -> nn.Module:
    """The model of a config; its tensors have shapes, but no memory behind them."""
    with torch.device("meta"):
        return instantiate(cfg.model)


@functools.lru_cache(maxsize=2 * len(ZOO))
def _of_the_zoo(name: str, num_classes: int) -> nn.Module:
    """The empty model of a name, for reading; kept, as it takes a third of a second to make."""
    cfg = get_config(name)
    cfg.model.num_classes = num_classes
    return empty_model(cfg)


def choose_config(state: Mapping[str, Tensor], official: bool) -> Choice:
    """The first model of the zoo that takes all tensors of ``state``.

    Args:
        state: complete, without wrappers.
        official: whether the names are those of the reference, or ours.

    Raises:
        CheckpointError: if none does; names the nearest and what differs.
    """
    bias = state.get(CLASS_BIAS[official])
    if bias is None:
        kind = "a checkpoint of the reference" if official else "a checkpoint of co_detr"
        raise CheckpointError(
            f"this is not {kind} ({CLASS_BIAS[official]} is missing): name another file"
            f"{'' if official else ', or leave --reverse out'}."
        )
    problems: dict[str, list[str]] = {}
    # A plain DETR takes its part of any such file: right only if nothing else fits. A config for
    # another number of classes is right only if none has the file's.
    rank: dict[str, tuple[bool, bool]] = {}
    for name in ZOO:
        problems[name], partial = _problems(state, _of_the_zoo(name, len(bias)), official)
        rank[name] = (partial, get_config(name).model.num_classes != len(bias))
    fitting = sorted((name for name in ZOO if not problems[name]), key=rank.__getitem__)
    if not fitting:
        nearest = min(ZOO, key=lambda name: len(problems[name]))
        raise CheckpointError(
            f"no config of the zoo fits this checkpoint; the nearest is {nearest} "
            f"({len(problems[nearest])} differences: {_first(problems[nearest])}): pass the right "
            "one as --config-file."
        )
    chosen, *others = fitting
    same = [name for name in others if rank[name] == rank[chosen]]
    return Choice(chosen, len(bias), same)


def _problems(
    state: Mapping[str, Tensor], model: nn.Module, official: bool
) -> tuple[list[str], bool]:
    """What does not fit, and whether tensors were left out for want of auxiliary heads."""
    partial, unknown = False, []
    if official:
        conversion = rename_official(state, model)
        state, unknown = conversion.state_dict, conversion.unknown
        partial = NO_AUXILIARY in conversion.ignored.values()
    kinds = {"unknown": unknown, **misfits(state, model)}
    return [f"{kind}: {entry}" for kind, entries in kinds.items() for entry in entries], partial


def _first(problems: Sequence[str]) -> str:
    return "; ".join(problems[:3])
