"""Weights of the reference implementation -> our names and back, by one table.

The table (`official_table`) knows every key of an official Co-DETR checkpoint. A key that no line
knows, or a parameter of ours that no key fills, is an error: nothing is dropped silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from co_detr.checkpoint.official_table import (
    EMA_COPIES,
    NO_MASK_SCORES,
    NO_MASKS,
    DroppedRow,
    Row,
    SplitRow,
    TableRow,
    table,
)
from co_detr.checkpoint.reading import plain_state, shorten, unwrap, with_present_names
from co_detr.errors import CheckpointError

if TYPE_CHECKING:
    from co_detr.modeling import CoDETR

_EMA = "ema_"


@dataclass(frozen=True)
class Conversion:
    """Renamed tensors, and what became of the rest.

    Attributes:
        state_dict: tensors in the names of the other side.
        ignored: keys that were left out on purpose -> why.
        restored: keys that were left out on the way to us and are made anew on the way back.
        absent: what cannot come back, in words.
        unknown: keys that the table does not know, or whose tensor it cannot take apart.
    """

    state_dict: dict[str, Tensor]
    ignored: dict[str, str] = field(default_factory=dict)
    restored: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def rename_official(official: Mapping[str, Tensor], model: CoDETR) -> Conversion:
    """Renames and reorders official tensors, complete or not (also gradients, for example).

    Args:
        official: tensors by the reference's names.
        model: decides the number of layers and the heads. Without auxiliary heads their keys are
            left out and listed as ignored.
    """
    rows = table(model)
    conversion = Conversion({})
    for key, value in official.items():
        try:
            known = any(_to_ours(row, key, value, conversion) for row in rows)
        except (RuntimeError, ValueError):  # not divisible into anchors or heads
            conversion.unknown.append(f"{key} of shape {tuple(value.shape)}")
        else:
            if not known:
                conversion.unknown.append(key)
    return conversion


def convert_official(official: Mapping[str, Tensor], model: CoDETR) -> Conversion:
    """Converts a complete official state dict for ``model``.

    Raises:
        CheckpointError: naming unknown keys, unfilled parameters and differing shapes.
    """
    conversion = rename_official(official, model)
    problems = {"official keys without a counterpart": conversion.unknown}
    problems |= misfits(conversion.state_dict, model)
    _raise_any(
        problems,
        "The official checkpoint does not fit this model",
        "Choose the config whose backbone, layers, classes and auxiliary heads are those of the "
        "checkpoint.",
    )
    return conversion


def restore_official(state: Mapping[str, Tensor], model: CoDETR) -> Conversion:
    """The inverse of `convert_official`: our complete state dict of ``model`` -> official.

    What was dropped on the way to us comes back where it can be made anew: the counters of batch
    norms, as zeros, and the rotary tables of a ViT. What a model without auxiliary heads lacks does
    not come back.

    Args:
        state: our tensors.
        model: whose tensors they are.

    Raises:
        CheckpointError: naming missing, unknown and differently shaped tensors of ``state``.
    """
    state = with_present_names(state, model)
    rows = table(model)
    conversion = Conversion({})
    splits = {name: row for row in rows if isinstance(row, SplitRow) for name in row.ours}
    for key, value in state.items():
        if key in splits:
            parts = [state[name] for name in splits[key].ours if name in state]
            conversion.state_dict[splits[key].official] = torch.stack(parts)
        elif not any(_to_official(row, key, value, conversion) for row in rows):
            conversion.unknown.append(key)
    problems = {"tensors without an official counterpart": conversion.unknown}
    problems |= misfits(state, model)
    _raise_any(
        problems,
        "The checkpoint does not fit this model",
        "Choose the config that it was trained with.",
    )
    for key, value in list(conversion.state_dict.items()):
        for row in rows:
            if isinstance(row, DroppedRow) and (dropped := row.restored_beside(key)):
                conversion.state_dict[dropped] = row.restore(value)
                conversion.restored.append(dropped)
    lost = {row.why for row in rows if isinstance(row, DroppedRow) and row.beside is None}
    conversion.absent.extend(sorted(lost - {EMA_COPIES, NO_MASKS, NO_MASK_SCORES}))
    return conversion


def misfits(state: Mapping[str, Tensor], model: torch.nn.Module) -> dict[str, list[str]]:
    """What keeps tensors in our names from filling ``model``, by kind of problem."""
    expected = model.state_dict()
    return {
        "parameters of the model that the checkpoint lacks": [
            key for key in expected if key not in state
        ],
        "keys that the model lacks": [key for key in state if key not in expected],
        "shapes that differ": [
            f"{key} is {tuple(value.shape)} but the model has {tuple(expected[key].shape)}"
            for key, value in state.items()
            if key in expected and value.shape != expected[key].shape
        ],
    }


def is_official(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a loaded file was written by the reference implementation."""
    return any(key.removeprefix("module.").startswith("query_head.") for key in unwrap(checkpoint))


def official_state_dict(
    checkpoint: Mapping[str, Any], path: str, ema: bool = False
) -> dict[str, Tensor]:
    """The state dict inside a loaded official checkpoint, without wrappers and prefixes.

    Args:
        checkpoint: the state dict itself, or a dict with it under ``state_dict`` or ``model``.
        path: of the file, for the error.
        ema: take the tensors named ``ema_...`` (dots replaced by underscores) instead of the plain
            ones. mmdet's hook swaps the two sets before it saves at the end of an epoch: then the
            plain names hold the average already, and these the weights of the optimizer.

    Raises:
        CheckpointError: if there is no state dict, or no second set for ``ema``.
    """
    state = plain_state(checkpoint, path)
    return _second_set(state) if ema else state


def _second_set(state: dict[str, Tensor]) -> dict[str, Tensor]:
    copies = {key: value for key, value in state.items() if key.startswith(_EMA)}
    names = {_EMA + key.replace(".", "_"): key for key in state if key not in copies}
    strangers = [key for key in copies if key not in names]
    if not copies or strangers:
        found = f"has {shorten(strangers)} without a plain tensor" if strangers else "has none"
        raise CheckpointError(
            "The second set of weights (names that begin with ema_) was asked for, but the "
            f"checkpoint {found}: leave --ema out."
        )
    # mmdet can leave buffers out of the second set (skip_buffers).
    return {key: copies.get(copy, state[key]) for copy, key in names.items()}


def _to_ours(row: TableRow, key: str, value: Tensor, into: Conversion) -> bool:
    """Adds what ``row`` makes of an official tensor; False if it does not know the key."""
    if isinstance(row, SplitRow):
        if key != row.official:
            return False
        into.state_dict.update(dict(zip(row.ours, value.unbind(), strict=True)))
    elif isinstance(row, DroppedRow):
        if not row.knows(key):
            return False
        into.ignored[key] = row.why
    else:
        name = row.to_ours(key)
        if name is None:
            return False
        into.state_dict[name] = value if row.rewrite is None else row.rewrite(value)
    return True


def _to_official(row: TableRow, key: str, value: Tensor, into: Conversion) -> bool:
    name = row.to_official(key) if isinstance(row, Row) else None
    if name is None:
        return False
    into.state_dict[name] = value if row.restore is None else row.restore(value)
    return True


def _raise_any(problems: dict[str, list[str]], what: str, remedy: str) -> None:
    if any(problems.values()):
        text = "; ".join(f"{kind}: {shorten(keys)}" for kind, keys in problems.items() if keys)
        raise CheckpointError(f"{what} ({text}). {remedy}")
