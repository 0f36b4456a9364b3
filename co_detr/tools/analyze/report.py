"""What a measure hands to the report, and the report: files of each section, and one HTML page.

Charts and pictures are readable in print and without telling red from green.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from co_detr.data.images import ImageReader, as_rgb
from co_detr.errors import WriteError
from co_detr.files import written_whole
from co_detr.tools.analyze.subjects import Sample
from co_detr.tools.draw.fonts import PictureFont, save_figure

FONT_SIZE = 11
_PANEL_WIDTH = 360
_GAP = 6
_DPI = 150
_CSS_DPI = 96

# Of pictures in the page; their files keep all pixels.
_PAGE_WIDTH = 2000

_JPEG_QUALITY = 85
_WIDE = 1.6
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


def new_axes(width: float = 4.8, height: float = 4.4) -> tuple[Figure, Axes]:
    """A figure of its own, in inches, with a single plot without a box around it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT_SIZE - 1)
    return figure, axes


def heat_map(rgb: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Scores ``(H, W)`` as colors over an image ``(H, W, 3)``, from their lowest to their highest.

    Colors are relative, as the scores of one map often differ little.
    """
    low, high = float(scores.min()), float(scores.max())
    relative = (scores - low) / max(high - low, 1e-12)
    colors = colormaps["inferno"](relative)[..., :3] * 255
    # The image in gray, so that its own colors are not taken for scores.
    gray = rgb.mean(axis=-1, keepdims=True)
    return (0.35 * gray + 0.65 * colors).round().astype(np.uint8)


def pixels_of(sample: Sample, image_format: str) -> np.ndarray:
    """The image that the model reads, ``(H, W, 3)`` uint8 RGB."""
    pixels = sample.input["image"].permute(1, 2, 0).cpu().numpy()
    pixels = as_rgb(pixels.clip(0, 255).astype(np.uint8))
    return pixels[:, :, ::-1] if image_format == "BGR" else pixels


def overlaid(
    name: str, caption: str, sample: Sample, image_format: str, maps: Mapping[str, np.ndarray]
) -> Picture:
    """The image of a sample with its boxes, and beside it each of the score maps over it."""
    rgb = pixels_of(sample, image_format)
    panels = {"image": rgb, **{title: heat_map(rgb, scores) for title, scores in maps.items()}}
    boxes = sample.input["instances"].gt_boxes.tensor.cpu().numpy()
    return Picture(name, caption, side_by_side(panels, boxes))


def side_by_side(panels: Mapping[str, np.ndarray], boxes: np.ndarray) -> np.ndarray:
    """Images of one size in a row, each with its title above and the boxes ``(G, 4)`` in it.

    Small images are enlarged by a whole number.
    """
    height, width = next(iter(panels.values())).shape[:2]
    factor = max(1, math.ceil(_PANEL_WIDTH / width))
    height, width = height * factor, width * factor
    font = PictureFont(max(15, width // 24))
    title_height = font.height + 4
    row = Image.new("RGB", ((width + _GAP) * len(panels) - _GAP, height + title_height), "white")
    draw = ImageDraw.Draw(row)
    for index, (title, image) in enumerate(panels.items()):
        left = index * (width + _GAP)
        panel = Image.fromarray(np.ascontiguousarray(image)).resize((width, height))
        _outline(panel, boxes * factor)
        row.paste(panel, (left, title_height))
        font.draw(draw, (left + (width - font.length(title)) / 2, 2), title, "black")
    return np.asarray(row)


def _outline(panel: Image.Image, boxes: np.ndarray) -> None:
    """White frames with a dark rim, which show on any ground."""
    draw = ImageDraw.Draw(panel)
    width = max(1, min(panel.size) // 200)
    for left, top, right, bottom in boxes.round().astype(int).tolist():
        right, bottom = max(left, right - 1), max(top, bottom - 1)
        draw.rectangle((left, top, right, bottom), outline="black", width=width + 2)
        inner = (left + 1, top + 1, max(left + 1, right - 1), max(top + 1, bottom - 1))
        draw.rectangle(inner, outline="white", width=width)


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
        tuple(_page_chart(chart) for chart in section.charts),
        tuple(_page_picture(picture) for picture in section.pictures),
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
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
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
        loader=jinja2.PackageLoader("co_detr.tools.analyze"),
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
