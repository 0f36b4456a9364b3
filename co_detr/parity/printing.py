"""A report as text: one line per entry, a table of files, the differences by design."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable
from math import isnan

from co_detr.parity.report import Line, Report

COLUMNS = ("ok", "given", "known", "FAIL")
HEADER = f"{'status':<8}{'abs':>8}{'rel':>9}  {'tolerance':<20} entry"


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
