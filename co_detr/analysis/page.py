"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2

from co_detr.analysis.output import PageImage, RenderedSection
from co_detr.analysis.section import Cell, Table


@dataclass(frozen=True)
class Frame:
    """What stands around the sections.

    Attributes:
        title: of the page.
        models: a row for each.
        images: which images were measured on, in a sentence.
        environment: name -> text.
        commands: what makes this report again.
    """

    title: str
    models: Table
    images: str
    environment: Mapping[str, str]
    commands: Sequence[str]


def report_page(frame: Frame, sections: Sequence[RenderedSection]) -> str:
    """The page; images are embedded, and all text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("co_detr.analysis"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        paragraphs=paragraphs,
        embedded=embedded,
        formatted_rows=formatted_rows,
    )
    return environment.get_template("report.html").render(frame=frame, sections=sections)


def embedded(image: PageImage) -> str:
    """The image as a URL that holds it."""
    return f"data:{image.media_type};base64,{base64.b64encode(image.content).decode()}"


def paragraphs(text: str) -> list[str]:
    """The parts between empty lines."""
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


@dataclass(frozen=True)
class FormattedCell:
    """Text of a cell, and whether it is a number and stands on the right."""

    text: str
    is_number: bool


def formatted_rows(table: Table) -> list[list[FormattedCell]]:
    """Numbers of a column have equally many decimals, about three digits of its largest one."""
    decimals = [_decimals([row[i] for row in table.rows]) for i in range(len(table.columns))]
    return [
        [_formatted(cell, places) for cell, places in zip(row, decimals, strict=True)]
        for row in table.rows
    ]


def _decimals(cells: Sequence[Cell]) -> int:
    fractions = [abs(cell) for cell in cells if isinstance(cell, float) and math.isfinite(cell)]
    largest = max(fractions, default=0.0)
    if largest <= 0.0:
        return 1
    return min(6, max(1, 2 - math.floor(math.log10(largest))))


def _formatted(cell: Cell, decimals: int) -> FormattedCell:
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return FormattedCell("–", True)  # an en dash
    if isinstance(cell, float):
        return FormattedCell(f"{cell:.{decimals}f}", True)
    if isinstance(cell, int):
        return FormattedCell(f"{cell:,}", True)
    return FormattedCell(cell, False)
