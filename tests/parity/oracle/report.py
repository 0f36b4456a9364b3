"""How far our numbers are from the reference's, entry by entry, and the report as text.

Every entry of a golden file must be accounted for.
"""

from __future__ import annotations

import textwrap
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tests.parity.oracle.golden import flatten
from tests.parity.oracle.tolerances import Difference

# One number, or one per column of the last axis.
Limit = float | tuple[float, ...]

# The first of these that an entry was given is its status.
STATUSES = ("FAIL", "known", "ok", "given")

# Relative to the largest magnitude of the entry.
FLOAT64 = 1e-10
FLOAT32 = 2e-6  # a few roundings of 6e-8 each, and other library versions' exp, log and sin
COLUMNS = ("ok", "given", "known", "FAIL")
HEADER = f"{'status':<8}{'abs':>8}{'rel':>9}  {'tolerance':<20} entry"


@dataclass(frozen=True)
class Deviation:
    """Outcome of one comparison.

    Attributes:
        absolute: largest deviation.
        relative: the same, relative to the largest magnitude of the reference.
        ratio: largest deviation in units of what is allowed; more than 1 is too much.
        note: why it is not ok, unless the numbers say so.
    """

    ok: bool
    absolute: float = nan
    relative: float = nan
    ratio: float = nan
    note: str = ""


def deviation(
    expected: Any, actual: Any, atol: Limit = 0.0, rtol: float = 0.0, where: Tensor | None = None
) -> Deviation:
    """Compares numbers or tensors; infinities must be in the same places, NaN never agrees.

    Args:
        atol: allowed deviation; rtol: the same, relative to the largest magnitude.
        where: bool, broadcast from the right to the shape; elsewhere nothing is compared.
    """
    expected = torch.as_tensor(expected).detach().to(torch.float64)
    actual = torch.as_tensor(actual).detach().to(torch.float64)
    if expected.numel() == actual.numel() == 1:  # the reference logs some scalars as (1,)
        actual = actual.reshape(expected.shape)
    if expected.shape != actual.shape:
        note = f"shape {tuple(actual.shape)}, reference {tuple(expected.shape)}"
        return Deviation(False, note=note)
    limit = torch.as_tensor(atol, dtype=torch.float64).broadcast_to(expected.shape)
    if where is not None:
        where = where.broadcast_to(expected.shape)
        expected, actual, limit = expected[where], actual[where], limit[where]
    finite = expected.isfinite()
    special = bool(((expected == actual) | finite).all() and actual[finite].isfinite().all())
    if not special:
        return Deviation(False, inf, inf, inf, "non-finite values differ")
    difference = (expected - actual)[finite].abs()
    if not difference.numel():
        return Deviation(True, 0.0, 0.0, 0.0)
    scale = expected[finite].abs().max().item()
    allowed = limit[finite] + rtol * scale
    # Without any allowance zero must be met exactly: 0 / 0 counts as 0, anything else as infinite.
    ratio = torch.where(difference == 0, 0.0, difference / allowed).max().item()
    worst = difference.max().item()
    relative = worst / scale if scale else (inf if worst else 0.0)
    return Deviation(ratio <= 1, worst, relative, ratio)


def equality(expected: Any, actual: Any) -> Deviation:
    """Compares integers, booleans, strings or lists of them."""
    if not isinstance(expected, Tensor):
        same = not isinstance(actual, Tensor) and expected == actual
        if same:
            return Deviation(True, 0.0, 0.0, 0.0)
        return Deviation(False, note=f"{actual!r}, reference {expected!r}"[:200])
    if not isinstance(actual, Tensor):
        return Deviation(False, note=f"{actual!r}, reference is a tensor"[:200])
    found = deviation(expected, actual)
    if found.ok or expected.shape != actual.shape:
        return found
    wrong = int((expected != actual).sum())
    return Deviation(False, found.absolute, found.relative, inf, f"{wrong} elements differ")


def match_rows(expected: Tensor, actual: Tensor, atol: Limit) -> Tensor:
    """Order that puts the rows of ``actual`` ``(N, X)`` beside those of ``expected``, one to one.

    Rows keep their places where these agree already, or where the shapes leave no choice.
    """
    places = torch.arange(len(actual))
    if expected.shape != actual.shape or not len(actual):
        return places
    limit = torch.as_tensor(atol, dtype=torch.float32)
    if ((expected - actual).abs() <= limit).all():
        return places
    distance = ((expected[:, None] - actual[None]).abs() / limit).amax(-1)
    # Beyond any tolerance all pairs are alike, which keeps the search short.
    cost = torch.nan_to_num(distance, nan=inf).clamp(max=10.0)
    _, columns = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(columns)


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
        note = "; ".join(text for text in (found.note, note) if text)
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
    parts = ["abs " + "/".join(f"{column:.1e}" for column in columns)] if any(columns) else []
    return " ".join([*parts, f"rel {rtol:.1e}"] if rtol else parts) or "equal"


def _below(name: str, prefix: str) -> bool:
    return name == prefix or (name.startswith(prefix) and name[len(prefix)] in ".[")


@dataclass(frozen=True)
class Unit:
    """Inputs and expected outputs of one function of the reference.

    Attributes:
        report: receives every reading as ``given`` and every comparison.
        name: of the entry, for example ``giou`` or ``focal[2]``.
        entry: the golden values by key.
        siblings: the other units of the file by name, where one takes inputs of another.
    """

    report: Report
    name: str
    entry: dict[str, Any]
    siblings: dict[str, Any] = field(default_factory=dict)

    def has(self, key: str) -> bool:
        return key in self.entry

    def __getitem__(self, key: str) -> Any:
        """An input of the check.

        Raises:
            KeyError: if the entry has no such key.
        """
        self.report.given(f"{self.name}.{key}", "input")
        return self.entry[key]

    def expected(self, key: str) -> Any:
        """An expected output, to explain a difference; does not account for it."""
        return self.entry[key]

    def close(self, key: str, actual: Any, rtol: float = FLOAT32, **options: Any) -> None:
        """See ``Report.close``, which takes the ``options``."""
        self.report.close(f"{self.name}.{key}", actual, rtol=rtol, **options)

    def exact(self, key: str, actual: Any) -> None:
        self.report.exact(f"{self.name}.{key}", actual)

    def remark(self, key: str, note: str) -> None:
        """An entry that nothing is made of."""
        self.report.given(f"{self.name}.{key}", note)

    def known(self, key: str, difference: Difference, holds: bool, note: str) -> None:
        self.report.known(f"{self.name}.{key}", difference, holds, note)


def level_shapes(shapes: Any) -> list[tuple[int, int]]:
    """``(L, 2)`` tensor or nested list -> ``(height, width)`` Python integers."""
    return [(int(height), int(width)) for height, width in shapes]


def format_line(line: Line) -> str:
    """Status, largest absolute and relative error, tolerance, name and remarks of an entry."""
    remarks = [f"[{line.difference.name}]"] if line.difference else []
    remarks += [f"({line.note})"] if line.note else []
    numbers = f"{_number(line.absolute):>8}{_number(line.relative):>9}"
    text = f"{line.status:<8}{numbers}  {line.tolerance:<20} {' '.join([line.name, *remarks])}"
    return text.rstrip()


def format_file(name: str, report: Report, failures_only: bool) -> str:
    """All lines of a file, with a headline."""
    lines = report.failures if failures_only else report.lines
    if not lines:
        return f"{name}: {_counts(report.lines)}"
    return "\n".join([f"{name}: {_counts(report.lines)}", HEADER, *map(format_line, lines), ""])


def format_summary(reports: dict[str, Report]) -> str:
    """One row per file and the differences by design that showed, each named once."""
    width = max(map(len, [*reports, "all files"]))
    titles = "".join(f"{status:>9}" for status in ("lines", *COLUMNS))
    rows = [f"{'file':<{width}}{titles}  worst error / tolerance"]
    for name, report in reports.items():
        rows.append(f"{name:<{width}}{_columns(report.lines)}  {_worst(report.lines)}")
    everything = [line for report in reports.values() for line in report.lines]
    rows.append(f"{'all files':<{width}}{_columns(everything)}")
    return "\n".join([*rows, *_differences(everything)])


def _number(value: float) -> str:
    return "-" if isnan(value) else "0" if value == 0 else f"{value:.1e}"


def _counts(lines: list[Line]) -> str:
    counts = Counter(line.status for line in lines)
    return ", ".join(f"{counts[status]} {status}" for status in COLUMNS if counts[status])


def _columns(lines: list[Line]) -> str:
    counts = Counter(line.status for line in lines)
    return "".join(f"{count:>9}" for count in (len(lines), *(counts[s] for s in COLUMNS)))


def _worst(lines: Iterable[Line]) -> str:
    measured = [line for line in lines if not isnan(line.ratio)]
    if not measured:
        return "-"
    worst = max(measured, key=lambda line: line.ratio)
    return f"{worst.ratio:.2g} {worst.name}"


def _differences(lines: list[Line]) -> list[str]:
    shown = {line.difference.name: line.difference for line in lines if line.difference}
    if not shown:
        return []
    rows = ["", "Differences by design (docs/fidelity.md)"]
    for name, difference in sorted(shown.items()):
        mine = [line for line in lines if line.difference is difference]
        differing = sum(line.status == "known" for line in mine)
        rows.append(f"  {name}: {differing} entries differ, {len(mine) - differing} were bridged")
        rows += textwrap.wrap(difference.text, 96, initial_indent="    ", subsequent_indent="    ")
    return rows
