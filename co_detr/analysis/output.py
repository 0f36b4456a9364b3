"""The files of a section: CSV, PNG, SVG and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from co_detr.analysis.section import Chart, Picture, Section, Table
from co_detr.data.images import ImageReader
from co_detr.errors import WriteError
from co_detr.files import written_whole
from co_detr.tools.draw.fonts import save_figure

_DPI = 150
_CSS_DPI = 96
# Of pictures in the page; their files keep all pixels.
_PAGE_WIDTH = 2000
_JPEG_QUALITY = 85
_WIDE = 1.6


@dataclass(frozen=True)
class PageImage:
    """A chart or picture as the page embeds it.

    Attributes:
        content: the bytes of a file; media_type: its kind, such as "image/png".
        width, height: as displayed, in CSS pixels.
    """

    caption: str
    content: bytes
    media_type: str
    width: int
    height: int

    @property
    def is_wide(self) -> bool:
        """Whether it needs a row of its own."""
        return self.width >= _WIDE * self.height


@dataclass(frozen=True)
class RenderedSection:
    """A section and its images for the page; those of charts are their PNG files."""

    section: Section
    charts: tuple[PageImage, ...]
    pictures: tuple[PageImage, ...]


def render(section: Section) -> RenderedSection:
    """Draws the charts and pictures."""
    return RenderedSection(
        section,
        tuple(_page_chart(each) for each in section.charts),
        tuple(_page_picture(each) for each in section.pictures),
    )


def _page_chart(chart: Chart) -> PageImage:
    png = chart_bytes(chart, "png")
    with ImageReader().open(io.BytesIO(png), chart.name) as image:
        width, height = (round(side * _CSS_DPI / _DPI) for side in image.size)
    return PageImage(chart.caption, png, "image/png", width, height)


def _page_picture(picture: Picture) -> PageImage:
    image = Image.fromarray(picture.image)
    image.thumbnail((_PAGE_WIDTH, 10 * _PAGE_WIDTH))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return PageImage(picture.caption, buffer.getvalue(), "image/jpeg", *image.size)


def chart_bytes(chart: Chart, file_format: str) -> bytes:
    """The figure as a "png" or "svg" file on white, the same bytes each time."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if file_format == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "co_detr"}):
        save_figure(
            chart.figure, buffer, format=file_format, dpi=_DPI, facecolor="white", metadata=metadata
        )
    return buffer.getvalue()


def _picture_bytes(picture: Picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture.image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def table_csv(table: Table) -> str:
    """The table with its header; None is an empty cell, numbers have all their digits."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return buffer.getvalue()


def plain(value: Any) -> Any:
    """What JSON can say: text keys, lists, Python numbers; None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_section(rendered: RenderedSection, folder: Path) -> None:
    """Writes ``<key>.json``, and below ``<key>/`` a file for each table, chart and picture.

    Raises:
        WriteError: if a file cannot be written.
    """
    section = rendered.section
    content = {"title": section.title, "text": section.text, "numbers": section.numbers}
    write_json(folder / f"{section.key}.json", content)
    inside = folder / section.key
    for table in section.tables:
        write_file(inside / f"{table.name}.csv", table_csv(table))
    for chart, image in zip(section.charts, rendered.charts, strict=True):
        write_file(inside / f"{chart.name}.png", image.content)
        write_file(inside / f"{chart.name}.svg", chart_bytes(chart, "svg"))
    for picture in section.pictures:
        write_file(inside / f"{picture.name}.png", _picture_bytes(picture))


def write_json(path: Path, content: Any) -> None:
    """Writes JSON; see `plain` and `write_file`."""
    text = json.dumps(plain(content), indent=2, allow_nan=False, ensure_ascii=False)
    write_file(path, f"{text}\n")


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file whole, and its folder where there is none.

    Raises:
        WriteError: if that is not possible.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(str(path), "w" if isinstance(content, str) else "wb") as file:
            file.write(content)
    except OSError as error:
        raise WriteError(
            f"{path} cannot be written ({error.strerror or error}): choose another --output-dir, "
            "or make room."
        ) from error
