"""Fonts for names in any script: Matplotlib's own one, and installed ones for what it lacks."""

from __future__ import annotations

import logging
import os
import warnings
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from PIL import ImageDraw, ImageFont

from co_detr.errors import ConfigError, first_line

VARIABLE = "CO_DETR_FONT"  # of the environment; font files, separated as the folders of PATH are

# On every machine, and has more than Latin letters.
_OWN = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
# Parts of names of files, the best first: plain fonts before bold, slanted and serif ones.
_PREFERRED = ("sanscjk-regular", "notosans-regular", "regular", "book", "sans")

logger = logging.getLogger(__name__)


class PictureFont:
    """Writes text of any script on PIL images, each letter with a font that has it.

    Args:
        size: height of the letters in pixels.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        # One height for all texts, whatever letters they have.
        self.height = sum(_loaded(_OWN, size).getmetrics())

    def length(self, text: str) -> float:
        """Width of a text in pixels."""
        return sum(font.getlength(part) for part, font in self._parts(text))

    def draw(
        self, picture: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, fill: str
    ) -> None:
        """Writes a text to the right of and below `corner`."""
        x, top = corner
        baseline = top + _loaded(_OWN, self._size).getmetrics()[0]
        for part, font in self._parts(text):
            picture.text((x, baseline), part, font=font, fill=fill, anchor="ls")
            x += font.getlength(part)

    def _parts(self, text: str) -> list[tuple[str, ImageFont.FreeTypeFont]]:
        """The text in parts of one font each."""
        parts: list[tuple[str, Path]] = []
        fonts = fonts_for(text)
        for letter in (" " if letter.isspace() else letter for letter in text):
            if letter != " " and not _is_drawn(letter):
                continue
            path = next((path for path in fonts if ord(letter) in _letters(path)), _OWN)
            if parts and parts[-1][1] == path:
                parts[-1] = (parts[-1][0] + letter, path)
            else:
                parts.append((letter, path))
        return [(part, _loaded(path, self._size)) for part, path in parts]


def save_figure(figure: Figure, target: Path | BinaryIO, **options: Any) -> None:
    """Matplotlib's ``savefig``, with fonts for letters that its own one lacks."""
    _make_legible(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # said once already
        figure.savefig(target, **options)


def _make_legible(figure: Figure) -> None:
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    fonts = fonts_for("".join(text.get_text() for text in texts))[1:]
    if not fonts:
        return
    known = {Path(font.fname) for font in font_manager.fontManager.ttflist}
    for path in fonts:
        if path not in known:
            font_manager.fontManager.addfont(path)
    names = [FT2Font(str(path)).family_name for path in fonts]
    for text in texts:
        text.set_fontfamily([*text.get_fontfamily(), *names])


def fonts_for(text: str) -> list[Path]:
    """Matplotlib's own font, and the files of those that are needed beside it for a text.

    Letters that no installed font has are named in a warning, once.

    Raises:
        ConfigError: if the environment names a font that cannot be read.
    """
    missing = frozenset(_wanted(text) - _letters(_OWN))
    return [_OWN, *_fonts_beside(missing, os.environ.get(VARIABLE))] if missing else [_OWN]


@lru_cache(maxsize=1024)  # pictures have the same few names again and again
def _fonts_beside(missing: frozenset[int], given: str | None) -> list[Path]:
    fonts = []
    first = [_readable(path) for path in given.split(os.pathsep)] if given else []
    for path in [*first, *_installed()]:
        if missing & _letters(path):
            fonts.append(path)
            missing -= _letters(path)
        if not missing:
            break
    _warn_of(missing)
    return fonts


def _wanted(text: str) -> set[int]:
    return {ord(letter) for letter in text if _is_drawn(letter)}


def _is_drawn(letter: str) -> bool:
    """Whether it is no space, no control character and no mark that chooses a letter's form."""
    is_variation_selector = 0xFE00 <= ord(letter) <= 0xFE0F
    return letter.isprintable() and not letter.isspace() and not is_variation_selector


_warned: set[int] = set()


def _warn_of(missing: frozenset[int]) -> None:
    new = missing - _warned
    _warned.update(new)
    if new:
        letters = "".join(map(chr, sorted(new)[:20]))
        logger.warning(
            "No font for the letters %s is installed, so that squares stand for them in pictures: "
            "install one (such as fonts-noto-cjk, or one of emoji without colors), or set %s to a "
            "font file.",
            *(letters, VARIABLE),
        )


def _readable(given: str) -> Path:
    path = Path(given).expanduser()
    try:
        FT2Font(str(path))
    except Exception as error:  # what FreeType cannot read raises errors of several kinds
        raise ConfigError(
            f"{VARIABLE}={path} is not a font that can be read ({first_line(error)}): name a .ttf, "
            ".otf or .ttc file."
        ) from error
    return path


@lru_cache(maxsize=1)
def _installed() -> list[Path]:
    """Files of installed fonts; the plain ones first."""

    def rank(path: Path) -> tuple[int, str]:
        name = path.name.lower()
        found = (i for i, part in enumerate(_PREFERRED) if part in name)
        return next(found, len(_PREFERRED)), str(path)

    return sorted(map(Path, font_manager.findSystemFonts()), key=rank)


@cache
def _letters(path: Path) -> frozenset[int]:
    """Code points that a font can draw at any size; none if it cannot be read."""
    try:
        font = FT2Font(str(path))
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except Exception:  # a damaged font of the system is no reason to draw nothing
        return frozenset()


@lru_cache(maxsize=32)
def _loaded(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size)
