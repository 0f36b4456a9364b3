"""The files of a section and the page: whole, self-contained, escaped."""

import base64
import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from co_detr.errors import WriteError
from co_detr.tools.analyze.report import (
    Chart,
    Frame,
    Picture,
    Section,
    Table,
    chart_bytes,
    formatted_rows,
    paragraphs,
    plain,
    render,
    report_page,
    table_csv,
    write_file,
    write_section,
)

NASTY = '<script>alert("1")</script> & <b>'
PIXELS = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3)


def make_figure() -> Figure:
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([1, 2, 3], label="a line")
    return figure


@pytest.fixture
def section() -> Section:
    return Section(
        key="sample",
        title=f"Title {NASTY}",
        text=f"First {NASTY}\nparagraph.\n\n \nSecond paragraph.",
        numbers={"array": np.array([1.5, np.nan]), 3: {"deep": (np.int64(4), None)}},
        tables=(
            Table(
                "numbers",
                f"Table {NASTY}",
                ("name", "count", "share"),
                (("one, two", 1234, 0.1234567890123), (NASTY, None, float("nan"))),
            ),
        ),
        charts=(Chart("line", f"Chart {NASTY}", make_figure()),),
        pictures=(Picture("pixels", f"Picture {NASTY}", PIXELS),),
    )


class Page(HTMLParser):
    """Collects elements, their attributes and the text."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(section: Section) -> tuple[str, Page]:
    frame = Frame(
        title=f"Report {NASTY}",
        models=Table("models", f"Models {NASTY}", ("model",), ((NASTY,),)),
        images=f"Images {NASTY}",
        environment={f"name {NASTY}": f"value {NASTY}"},
        commands=(f"python {NASTY}",),
    )
    html = report_page(frame, [render(section)])
    return html, Page(html)


def test_page_needs_nothing_else(section):
    html, page = page_of(section)
    assert not page.open
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name)
            if value is not None:
                assert value.startswith(("data:", "#")), (tag, name, value)
    assert not page.all("script") and not page.all("iframe")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    assert "http" not in html


def test_images_are_embedded_and_described(section):
    _, page = page_of(section)
    chart, picture = page.all("img")
    assert chart["alt"] == f"Chart: Chart {NASTY}"
    assert picture["alt"] == f"Picture: Picture {NASTY}"
    # At 150 dots per inch for 96 CSS pixels: sharp on dense screens.
    assert embedded(chart, "image/png").size == (450, 300)
    assert (chart["width"], chart["height"]) == ("288", "192")
    pixels = embedded(picture, "image/jpeg")
    assert pixels.size == (6, 4) == (int(picture["width"]), int(picture["height"]))
    assert np.abs(np.asarray(pixels).astype(int) - PIXELS).mean() < 8


def embedded(image: dict[str, str], media_type: str) -> Image.Image:
    assert image["src"].startswith(f"data:{media_type};base64,")
    return Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))


def test_large_pictures_are_reduced_in_the_page_only(section, tmp_path):
    large = np.zeros((50, 4000, 3), dtype=np.uint8)
    section = dataclasses.replace(section, pictures=(Picture("large", "Large", large),))
    rendered = render(section)
    assert (rendered.pictures[0].width, rendered.pictures[0].height) == (2000, 25)
    assert rendered.pictures[0].is_wide and not rendered.charts[0].is_wide
    write_section(rendered, tmp_path)
    assert Image.open(tmp_path / "sample/large.png").size == (4000, 50)


def test_every_text_is_escaped(section):
    html, page = page_of(section)
    assert "<script" not in html and "<b>" not in html
    text = "".join(page.text)
    for where in ("Report", "Models", "Images", "name", "value", "python", "Title", "First"):
        assert f"{where} {NASTY}" in text, where
    assert f"Table {NASTY}" in text and f"Chart {NASTY}" in text and f"Picture {NASTY}" in text


def test_contents_lead_to_every_section(section):
    _, page = page_of(section)
    targets = [link["href"].removeprefix("#") for link in page.all("a")]
    assert targets == ["models", "sample", "origin"]
    assert [tag["id"] for tag in page.all("section")] == targets
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert page.all("html")[0]["lang"] == "en"


def test_text_is_split_into_paragraphs(section):
    assert paragraphs(section.text) == [f"First {NASTY}\nparagraph.", "Second paragraph."]


def test_numbers_of_a_column_have_equally_many_decimals():
    table = Table(
        "t",
        "c",
        ("a", "b", "c", "d", "e"),
        ((1.0, 0.5, 123.456, "x", 12345), (22.25, 0.0125, 1.0, None, 7)),
    )
    texts = [[cell.text for cell in row] for row in formatted_rows(table)]
    assert texts == [["1.0", "0.500", "123.5", "x", "12,345"], ["22.2", "0.013", "1.0", "–", "7"]]
    assert [cell.is_number for cell in formatted_rows(table)[0]] == [True] * 3 + [False, True]


def test_files_hold_all_digits(section, tmp_path):
    write_section(render(section), tmp_path)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    expected = ["line.png", "line.svg", "numbers.csv", "pixels.png"]
    assert names == sorted(["sample.json", *(f"sample/{name}" for name in expected)])
    rows = list(csv.reader(io.StringIO((tmp_path / "sample/numbers.csv").read_text())))
    assert rows[0] == ["name", "count", "share"]
    assert rows[1][0] == "one, two" and int(rows[1][1]) == 1234
    assert float(rows[1][2]) == 0.1234567890123
    assert rows[2] == [NASTY, "", "nan"]
    content = json.loads((tmp_path / "sample.json").read_text())
    assert content["numbers"] == {"array": [1.5, None], "3": {"deep": [4, None]}}
    assert content["text"] == section.text and content["title"] == section.title
    assert (np.asarray(Image.open(tmp_path / "sample/pixels.png")) == PIXELS).all()


def test_csv_of_an_empty_table_is_its_header():
    assert table_csv(Table("t", "c", ("a", "b"), ())) == "a,b\n"


def test_charts_are_the_same_bytes_each_time():
    for file_format in ("png", "svg"):
        first, second = (chart_bytes(Chart("c", "c", make_figure()), file_format) for _ in range(2))
        assert first == second
    assert first.lstrip().startswith(b"<?xml")


def test_json_refuses_what_it_does_not_know():
    assert plain({"a": [np.float32(0.5), float("inf"), True]}) == {"a": [0.5, None, True]}
    with pytest.raises(TypeError):
        json.dumps(plain({"a": object()}))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file/report.html cannot be written .*--output-dir"):
        write_file(tmp_path / "file" / "report.html", "x")
