"""Results as Markdown for people and as JSON for programs."""

import json
from collections.abc import Sequence
from pathlib import Path

from .timing import Timing


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with aligned columns: text left, everything after the first right."""
    cells = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(cells[0]), line(rule), *(line(row) for row in cells[1:])])


def format_ms(timing: Timing) -> str:
    """Median and quartiles in milliseconds, as "12.3 (11.9-13.0)"."""
    first, third = timing.quartiles
    return f"{_digits(timing.median)} ({_digits(first)}-{_digits(third)})"


def _digits(seconds: float) -> str:
    milliseconds = seconds * 1e3
    decimals = 3 if milliseconds < 1 else 2 if milliseconds < 10 else 1 if milliseconds < 100 else 0
    return f"{milliseconds:.{decimals}f}"


def write_json(path: str | Path, data: object) -> None:
    """Write ``data`` to ``path``, making its folder; infinite and NaN numbers are an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")
