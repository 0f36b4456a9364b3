"""Names in any script are drawn with fonts that have their letters, or one line says why not."""

import logging

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from co_detr.errors import ConfigError
from co_detr.tools.draw import fonts
from co_detr.tools.draw.fonts import VARIABLE, PictureFont, save_figure


@pytest.fixture
def no_others(monkeypatch):
    """No font of this machine counts, and nothing was said yet."""
    monkeypatch.setattr(fonts, "_installed", list)
    monkeypatch.setattr(fonts, "_warned", set())
    monkeypatch.delenv(VARIABLE, raising=False)
    fonts._fonts_beside.cache_clear()
    yield
    fonts._fonts_beside.cache_clear()


def write_font(path, letters, family):
    """A font whose letters are filled bars of half the height."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 500), (900, 500), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    bar, names = pen.glyph(), [f"letter{ord(letter)}" for letter in letters]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap(dict(zip(map(ord, letters), names, strict=True)))
    builder.setupGlyf(dict.fromkeys([".notdef", *names], bar))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names], (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def drawn(text, size=20):
    picture = Image.new("L", (200, 40))
    PictureFont(size).draw(ImageDraw.Draw(picture), (0, 0), text, "white")
    return np.asarray(picture)


def figure_of(text, target):
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().set_title(text)
    save_figure(figure, target)
    return np.asarray(Image.open(target))


def test_letters_come_from_the_font_that_has_them(no_others, monkeypatch, tmp_path):
    square = drawn("\u82f9")
    first = write_font(tmp_path / "first.ttf", "\u82f9", "First of two")
    second = write_font(tmp_path / "second.ttf", "\u679c", "Second of two")
    monkeypatch.setattr(fonts, "_installed", lambda: [first, second])
    fonts._fonts_beside.cache_clear()
    bar = drawn("\u82f9")
    filled = np.argwhere(bar > 128)
    height, width = filled.max(0) - filled.min(0) + 1
    assert abs(height - 10) <= 1 and abs(width - 18) <= 1 and not np.array_equal(bar, square)
    # Each letter with its own font, the others with Matplotlib's.
    both = drawn("a\u82f9\u679c")
    start = round(PictureFont(20).length("a"))
    assert np.array_equal(both[:, :start], drawn("a")[:, :start])
    assert both[10, start : start + 38].mean() > 200
    assert PictureFont(20).length("a\u82f9\u679c") == pytest.approx(start + 40, abs=1)


def test_figures_use_them_too(no_others, monkeypatch, tmp_path, caplog):
    square = figure_of("\u82f9\u679c", tmp_path / "without.png")
    path = write_font(tmp_path / "font.ttf", "\u82f9\u679c", "Fruit of a test")
    monkeypatch.setenv(VARIABLE, str(path))
    caplog.clear()
    assert not np.array_equal(square, figure_of("\u82f9\u679c", tmp_path / "with.png"))
    assert not caplog.records


def test_what_is_missing_is_said_once(no_others, caplog, recwarn, tmp_path):
    with caplog.at_level(logging.WARNING):
        drawn("\u82f9\u679c x")
        drawn("\u82f9")
        figure_of("\u82f9", tmp_path / "a.png")
    (record,) = caplog.records
    assert "\u679c\u82f9 is installed" in record.getMessage() and VARIABLE in record.getMessage()
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_letters_that_every_machine_has(no_others, caplog):
    drawn("\u00c4rger \u03b1 \u0416 \u2192 \ufe0f\n\u200d\ud800")
    assert not caplog.records


def test_a_font_that_is_none_is_explained(no_others, monkeypatch, tmp_path):
    path = tmp_path / "notes.ttf"
    path.write_text("no font")
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(ConfigError, match=f"{VARIABLE}=.*notes.ttf is not a font that can be read"):
        drawn("\u82f9")
