"""Class heads for another list of classes: their rows are carried over by the names of the classes.

What rows a layer has, it says itself (`class_layers`, of `ClassRows`): one or several a class, for
every anchor again, and one for the background.
"""

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

NUM_LISTED = 6  # names in a line of a report


@dataclass(frozen=True)
class ClassMap:
    """Which class of a checkpoint is which class of the model.

    Attributes:
        pairs: (index in the checkpoint, index in the model) of what goes together.
        kept: names of the model's classes that have a counterpart.
        new: names of those that have none; their rows keep their initial values.
        unused: names of the checkpoint's classes that are no counterpart.
        sources: of `kept`, those whose counterpart has another name, with that name.
        tensors: names of the tensors whose rows were carried over -> the rows without counterpart.
    """

    pairs: list[tuple[int, int]]
    kept: list[str]
    new: list[str]
    unused: list[str]
    sources: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, list[int]] = field(default_factory=dict)

    @property
    def num_theirs(self) -> int:
        """Number of classes of the checkpoint."""
        return len({theirs for theirs, _ in self.pairs}) + len(self.unused)

    @property
    def num_ours(self) -> int:
        """Number of classes of the model."""
        return len(self.kept) + len(self.new)


def match_classes(
    theirs: Sequence[str], ours: Sequence[str], sources: Mapping[str, str] | None = None
) -> ClassMap:
    """Pairs classes whose names are equal but for upper and lower case.

    Args:
        sources: of some of `ours`, which of `theirs` is the counterpart in place of that of the
            same name. One of theirs may be the counterpart of several.

    Raises:
        CheckpointError: if a list names a class twice, or `sources` a class that is in none.
    """
    by_name = _indices(theirs, "checkpoint")
    own = _indices(ours, "data set")
    chosen = {}
    for name, source in (sources or {}).items():
        for wanted, there, where in ((name, own, "data"), (source, by_name, "checkpoint")):
            if wanted.casefold() not in there:
                names = ours if there is own else theirs
                raise CheckpointError(
                    f"train.init_checkpoint_classes names {wanted}, which is no class of the "
                    f"{where}: choose from {shorten(names)}."
                )
        chosen[name.casefold()] = source.casefold()
    counterparts = {name: chosen.get(name, name) for name in own}
    kept = [name for name, source in counterparts.items() if source in by_name]
    used = {counterparts[name] for name in kept}
    return ClassMap(
        pairs=[(by_name[counterparts[name]], own[name]) for name in kept],
        kept=[ours[own[name]] for name in kept],
        new=[ours[index] for name, index in own.items() if name not in kept],
        unused=[theirs[index] for name, index in by_name.items() if name not in used],
        sources={ours[own[name]]: theirs[by_name[source]] for name, source in chosen.items()},
    )


def match_stored_classes(
    content: Mapping[str, Any],
    ours: Sequence[str] | None,
    path: str,
    by_name: bool,
    sources: Mapping[str, str] | None = None,
) -> ClassMap | None:
    """Pairs the classes of a loaded file with those of the data, or warns that they differ.

    Args:
        content: of the file.
        ours: names of the data's classes; None: unknown.
        path: of the file, for the warning.
        by_name: whether to pair them; else class heads keep their order.
        sources: see `match_classes`.

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
        return match_classes(theirs, ours, sources)
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
        f"{path}.{layer}.".lstrip("."): kind
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
        by_position = _is_objectness(key, model)
        sources, targets = _rows(kind, classes, by_position)
        new = own.clone()
        for theirs, ours in zip(old.chunk(repeats), new.chunk(repeats), strict=True):
            ours[targets] = theirs[sources].to(ours)
        state[key] = new
        per_repeat = kind.rows(classes.num_ours)
        fresh = sorted(set(range(per_repeat)) - set(targets))
        classes.tensors[key] = [
            repeat * per_repeat + row for repeat in range(repeats) for row in fresh
        ]


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


def class_lines(classes: ClassMap) -> list[str]:
    """What a report says of them."""
    lines = [
        f"  {len(classes.kept)} of {classes.num_ours} classes taken over by name, in "
        f"{len(classes.tensors)} tensors{_names(classes.kept)}"
    ]
    if classes.sources:
        pairs = [f"{ours} from {theirs}" for ours, theirs in classes.sources.items()]
        lines.append(f"  {len(pairs)} of them are of another name{_names(pairs)}")
    if classes.new:
        lines.append(f"  {len(classes.new)} start from initial values{_names(classes.new)}")
    if classes.unused:
        lines.append(
            f"  {len(classes.unused)} of {classes.num_theirs} classes of the file are not used"
            f"{_names(classes.unused)}"
        )
    return lines


def _names(names: list[str]) -> str:
    return f": {shorten(names, NUM_LISTED)}" if names else ""


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
