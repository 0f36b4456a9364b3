"""Carries class heads over to another list of classes, row by row, by class name."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from co_detr.checkpoint.reading import shorten, stored_class_names
from co_detr.errors import CheckpointError
from co_detr.structures import ClassRows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassMap:
    """Which class of a checkpoint is which class of the model.

    Attributes:
        pairs: (index in the checkpoint, index in the model) of the classes with the same name.
        kept: names of the classes that both have.
        new: names that only the model has; their rows keep their initial values.
        unused: names that only the checkpoint has.
        tensors: names of the tensors whose rows were carried over.
    """

    pairs: list[tuple[int, int]]
    kept: list[str]
    new: list[str]
    unused: list[str]
    tensors: list[str] = field(default_factory=list)

    @property
    def num_theirs(self) -> int:
        """Number of classes of the checkpoint."""
        return len(self.kept) + len(self.unused)

    @property
    def num_ours(self) -> int:
        """Number of classes of the model."""
        return len(self.kept) + len(self.new)


def match_classes(theirs: Sequence[str], ours: Sequence[str]) -> ClassMap:
    """Pairs classes whose names are equal but for upper and lower case.

    Raises:
        CheckpointError: if a list names a class twice.
    """
    by_name = _indices(theirs, "checkpoint")
    own = _indices(ours, "data set")
    kept = [name for name in own if name in by_name]
    return ClassMap(
        pairs=[(by_name[name], own[name]) for name in kept],
        kept=[ours[own[name]] for name in kept],
        new=[ours[index] for name, index in own.items() if name not in by_name],
        unused=[theirs[index] for name, index in by_name.items() if name not in own],
    )


def match_stored_classes(
    content: Mapping[str, Any], ours: Sequence[str] | None, path: str, by_name: bool
) -> ClassMap | None:
    """Pairs the classes of a loaded file with those of the data, or warns that they differ.

    Args:
        content: of the file.
        ours: names of the data's classes; None: unknown.
        path: of the file, for the warning.
        by_name: whether to pair them; else class heads keep their order.

    Raises:
        CheckpointError: if they are to be paired and one side does not name its classes.
    """
    theirs = stored_class_names(content)
    if by_name:
        if not theirs or not ours:
            side = "checkpoint" if not theirs else "data set"
            raise CheckpointError(
                f"the {side} does not say the names of its classes, which "
                "train.init_checkpoint_mismatch=by_name needs: set it to reset."
            )
        return match_classes(theirs, ours)
    if theirs and ours and _folded(theirs) != _folded(ours):
        logger.warning(
            "%s was trained on %d classes (%s), the data has %d (%s): class heads are taken over "
            "%s; train.init_checkpoint_mismatch=by_name would match them.",
            *(os.path.basename(path), len(theirs), shorten(theirs)),
            *(len(ours), shorten(ours), "by position, not by name"),
        )
    return None


def remap_classes(state: dict[str, Tensor], model: nn.Module, classes: ClassMap) -> None:
    """Replaces the class tensors of ``state``, in place, by those of ``model`` with the rows of the
    paired classes (and of the background) taken from ``state``.

    Tensors whose rows are not those of the two lists of classes are left as they are.
    """
    kinds = {
        f"{path}.{layer}.": kind
        for path, module in model.named_modules()
        for layer, kind in getattr(module, "class_layers", {}).items()
    }
    for key, own in model.state_dict().items():
        kind = next((kind for prefix, kind in kinds.items() if key.startswith(prefix)), None)
        if kind is None or key not in state:
            continue
        old = state[key]
        repeats = kind.repeats(len(own), classes.num_ours)
        if not repeats or repeats != kind.repeats(len(old), classes.num_theirs):
            continue
        if old.shape[1:] != own.shape[1:]:
            continue
        sources, targets = _rows(kind, classes, by_position=_is_objectness(key, model))
        new = own.clone()
        for theirs, ours in zip(old.chunk(repeats), new.chunk(repeats), strict=True):
            ours[targets] = theirs[sources].to(ours)
        state[key] = new
        classes.tensors.append(key)


def _rows(kind: ClassRows, classes: ClassMap, by_position: bool) -> tuple[list[int], list[int]]:
    if by_position:
        pairs = [(index, index) for index in range(min(classes.num_theirs, classes.num_ours))]
    else:
        pairs = classes.pairs
    width = kind.width
    sources = [width * theirs + row for theirs, _ in pairs for row in range(width)]
    targets = [width * ours + row for _, ours in pairs for row in range(width)]
    if kind.background:
        sources.append(classes.num_theirs)
        targets.append(classes.num_ours)
    return sources, targets


def _is_objectness(key: str, model: nn.Module) -> bool:
    """Whether row 0 stands for "object", whatever class 0 is (see `TwoStageQueries.ranking`)."""
    source, _, _ = key.rpartition(".class_head.")
    return bool(source) and getattr(model.get_submodule(source), "ranking", "") == "first_class"


def _indices(names: Sequence[str], where: str) -> dict[str, int]:
    indices = {name.casefold(): index for index, name in enumerate(names)}
    if len(indices) < len(names):
        twice = next(name for i, name in enumerate(names) if indices[name.casefold()] != i)
        raise CheckpointError(
            f'the {where} has the class "{twice}" twice (upper and lower case aside), so classes '
            "cannot be told by name: set train.init_checkpoint_mismatch=reset."
        )
    return indices


def _folded(names: Sequence[str]) -> list[str]:
    return [name.casefold() for name in names]
