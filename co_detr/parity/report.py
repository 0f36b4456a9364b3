"""Book-keeping of a fidelity check: every entry of a golden file must be accounted for."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import isnan, nan
from pathlib import Path
from typing import Any

from torch import Tensor

from co_detr.parity.compare import Deviation, Limit, deviation, equality
from co_detr.parity.differences import Difference
from co_detr.parity.golden_file import flatten

# The first of these that an entry was given is its status.
STATUSES = ("FAIL", "known", "ok", "given")


@dataclass(frozen=True)
class Line:
    """What became of one entry.

    Attributes:
        status: ``ok``, ``FAIL``, ``given`` (fed to our code instead of compared) or ``known``
            (differs by design, see ``difference``).
        absolute, relative, ratio: see ``Deviation``.
        tolerance: as text; ``equal`` allows no deviation.
        difference: the difference by design that the entry shows or was bridged for.
    """

    name: str
    status: str
    absolute: float = nan
    relative: float = nan
    ratio: float = nan
    tolerance: str = ""
    note: str = ""
    difference: Difference | None = None

    def merged(self, other: Line) -> Line:
        """Both findings about one entry as one line: the worse one's numbers, both notes."""
        worse, better = sorted((self, other), key=_badness)
        if isnan(worse.absolute) and worse.status != "FAIL":
            worse = replace(
                worse,
                absolute=better.absolute,
                relative=better.relative,
                ratio=better.ratio,
                tolerance=better.tolerance,
            )
        notes = dict.fromkeys(note for note in (self.note, other.note) if note)
        difference = worse.difference or better.difference
        return replace(worse, note="; ".join(notes), difference=difference)


def _badness(line: Line) -> tuple[int, float]:
    return STATUSES.index(line.status), 0.0 if isnan(line.ratio) else -line.ratio


@dataclass
class Report:
    """Compares the entries of one golden file and remembers which are left.

    Attributes:
        entries: leaves of the file by dotted name, for example ``train.rpn.proposals[0]``.
        dropped: names of entries, and of groups of them, that the file may lack.
    """

    entries: dict[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    _lines: dict[str, Line] = field(default_factory=dict)

    @property
    def lines(self) -> list[Line]:
        return list(self._lines.values())

    @property
    def failures(self) -> list[Line]:
        return [line for line in self.lines if line.status == "FAIL"]

    def has(self, prefix: str) -> bool:
        """Whether the file has entries at or below ``prefix``."""
        return any(_below(name, prefix) for name in self.entries)

    def finish(self) -> None:
        """Fails every entry that nothing compared."""
        for name in self.entries:
            if name not in self._lines:
                self._add(Line(name, "FAIL", note="not compared"))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Turns whatever stops a part of the check into a failure, so that others still run."""
        try:
            yield
        except Exception as error:  # the check itself broke; its entries stay "not compared"
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            note = f"stopped at {where} by {type(error).__name__}: {error}"
            self._add(Line(f"<check of {name}>", "FAIL", note=" ".join(note.split())))

    def given(self, prefix: str, note: str, difference: Difference | None = None) -> None:
        """Marks the entries below ``prefix`` as inputs of the check."""
        self._mark(prefix, Line("", "given", note=note, difference=difference))

    def fail(self, prefix: str, note: str) -> None:
        self._mark(prefix, Line("", "FAIL", note=note))

    def record(
        self,
        prefix: str,
        found: Deviation,
        tolerance: str,
        note: str = "",
        difference: Difference | None = None,
    ) -> None:
        """Records a comparison made by the caller.

        Args:
            difference: if given, the entry was compared in spite of this difference.
        """
        note = "; ".join(each for each in (found.note, note) if each)
        numbers = (found.absolute, found.relative, found.ratio)
        status = "ok" if found.ok else "FAIL"
        self._mark(prefix, Line("", status, *numbers, tolerance, note, difference))

    def derived(self, name: str, found: Deviation, tolerance: str, note: str = "") -> None:
        """Records a comparison of what follows from several entries, as a line of its own."""
        numbers = (found.absolute, found.relative, found.ratio)
        self._add(Line(name, "ok" if found.ok else "FAIL", *numbers, tolerance, note))

    def known(self, prefix: str, difference: Difference, holds: bool, note: str = "") -> None:
        """Marks a difference by design; fails if what explains it does not hold."""
        note = note if holds else f"{note}; {difference.name} does not explain it"
        status = "known" if holds else "FAIL"
        self._mark(prefix, Line("", status, note=note, difference=difference))

    def exact(self, name: str, actual: Any, note: str = "", difference=None) -> None:
        """Compares integers, booleans, strings or (nested lists of) tensors for equality."""

        def compare(leaf: str, value: Any) -> None:
            self.record(leaf, equality(self.entries[leaf], value), "equal", note, difference)

        self._each(name, actual, compare)

    def close(
        self,
        name: str,
        actual: Any,
        atol: Limit = 0.0,
        rtol: float = 0.0,
        note: str = "",
        where: Tensor | None = None,
        difference: Difference | None = None,
    ) -> None:
        """Compares floats or (nested lists of) tensors; see ``compare.deviation``."""

        def compare(leaf: str, value: Any) -> None:
            found = deviation(self.entries[leaf], value, atol, rtol, where)
            self.record(leaf, found, describe(atol, rtol), note, difference)

        self._each(name, actual, compare)

    def _mark(self, prefix: str, line: Line) -> None:
        names = [name for name in self.entries if _below(name, prefix)]
        for name in names:
            self._add(replace(line, name=name))
        if not names:
            self._missing(prefix)

    def _each(self, name: str, actual: Any, compare: Callable[[str, Any], None]) -> None:
        leaves = flatten(actual, name)
        for leaf, value in leaves.items():
            if leaf in self.entries:
                compare(leaf, value)
            else:
                self._missing(leaf)
        for leaf in self.entries:
            if _below(leaf, name) and leaf not in leaves:
                self._add(Line(leaf, "FAIL", note="we have no such entry"))

    def _missing(self, name: str) -> None:
        if not any(_below(name, prefix) for prefix in self.dropped):
            self._add(Line(name, "FAIL", note="the file has no such entry"))

    def _add(self, line: Line) -> None:
        earlier = self._lines.get(line.name)
        self._lines[line.name] = line if earlier is None else earlier.merged(line)


def describe(atol: Limit, rtol: float = 0.0) -> str:
    """A tolerance as text: ``abs 1.0e-03``; per column without repetitions."""
    columns = dict.fromkeys(atol if isinstance(atol, tuple) else (atol,))
    parts = ["abs " + "/".join(f"{each:.1e}" for each in columns)] if any(columns) else []
    return " ".join([*parts, f"rel {rtol:.1e}"] if rtol else parts) or "equal"


def _below(name: str, prefix: str) -> bool:
    return name == prefix or (name.startswith(prefix) and name[len(prefix)] in ".[")
