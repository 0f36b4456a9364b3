"""Lines of the table that names every tensor of the reference implementation and of ours.

A table is a list of lines and is read in both directions; the first line that knows a key decides.
`co_detr.checkpoint_rows` has the lines of the transformer and the heads,
`co_detr.checkpoint_backbones` those of the backbones.

Keys are written with placeholders: ``{i}``, ``{j}`` for a number, ``{leaf}`` for a name
without dots, ``{rest}`` for any tail. A line has the same placeholders on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

Rewrite: TypeAlias = Callable[[Tensor], Tensor]

_PLACEHOLDERS = {"i": r"\d+", "j": r"\d+", "leaf": r"[^.]+", "rest": r".+"}


@dataclass(frozen=True)
class Row:
    """One tensor there is one tensor here.

    Attributes:
        official: key of the reference.
        ours: our key.
        rewrite: applied to the tensor on its way to us.
        restore: the inverse of ``rewrite``; both or none.
    """

    official: str
    ours: str
    rewrite: Rewrite | None = None
    restore: Rewrite | None = None

    def __post_init__(self) -> None:
        if (self.rewrite is None) != (self.restore is None):
            raise ValueError(f"the row of {self.official} needs both rewrite and restore, or none")

    def to_ours(self, key: str) -> str | None:
        """Our name of an official key, or None if the row does not know it."""
        return _translate(self.official, self.ours, key)

    def to_official(self, key: str) -> str | None:
        """The official name of one of our keys, or None if the row does not know it."""
        return _translate(self.ours, self.official, key)


@dataclass(frozen=True)
class SplitRow:
    """One table there, one tensor per line of it here.

    Attributes:
        official: key of the reference, of a tensor (n, ...).
        ours: our keys of its n slices, in order; no placeholders.
    """

    official: str
    ours: tuple[str, ...]


@dataclass(frozen=True)
class DroppedRow:
    """A tensor of the reference that we have no use for.

    Attributes:
        official: key of the reference.
        why: what a report says about it, such as "counters of batch norms, which are frozen here".
        beside: official key with the same placeholders, of a tensor that is there whenever this one
            is; None if nothing can bring this one back.
        restore: makes this tensor from the one of ``beside``.
    """

    official: str
    why: str
    beside: str | None = None
    restore: Rewrite | None = None

    def __post_init__(self) -> None:
        if (self.beside is None) != (self.restore is None):
            raise ValueError(f"the row of {self.official} needs both beside and restore, or none")

    def knows(self, key: str) -> bool:
        """Whether this official key is left out by this row."""
        return _pattern(self.official).fullmatch(key) is not None

    def restored_beside(self, key: str) -> str | None:
        """The key to restore beside the official ``key``, or None."""
        return None if self.beside is None else _translate(self.beside, self.official, key)


TableRow: TypeAlias = Row | SplitRow | DroppedRow


def zero_counter(beside: Tensor) -> Tensor:
    """A batch norm's ``num_batches_tracked`` that has counted nothing."""
    return torch.zeros((), dtype=torch.int64, device=beside.device)


def _translate(source: str, target: str, key: str) -> str | None:
    found = _pattern(source).fullmatch(key)
    return None if found is None else target.format(**found.groupdict())


@cache
def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for name, expression in _PLACEHOLDERS.items():
        pattern = pattern.replace(re.escape("{" + name + "}"), f"(?P<{name}>{expression})")
    return re.compile(pattern)
