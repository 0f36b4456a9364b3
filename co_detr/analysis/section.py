"""What a measure hands to the report: text, numbers, tables, charts and pictures."""

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; None is an empty cell.

    ``name`` is its file's name without ending, unique within a section.
    """

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Chart:
    """A matplotlib figure, written as PNG and as SVG."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Picture:
    """An image `(H, W, 3)` of uint8, RGB."""

    name: str
    caption: str
    image: np.ndarray


@dataclass(frozen=True)
class Section:
    """One measure's part of the report.

    ``key`` names its files, ``text`` holds paragraphs parted by empty lines, and ``numbers`` is
    what goes into its JSON file.
    """

    key: str
    title: str
    text: str
    numbers: dict
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    pictures: tuple[Picture, ...] = ()
