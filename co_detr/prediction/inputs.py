"""Files that the inputs of a command line stand for."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from co_detr.errors import DataError

IMAGES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
)
VIDEOS = frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"))


@dataclass(frozen=True)
class Inputs:
    """Attributes:
    files: each once, in the order of the command line, sorted within a folder or pattern.
    problems: one sentence for each input that stands for no file.
    """

    files: list[Path]
    problems: list[str]


def find_inputs(arguments: Sequence[str], suffixes: frozenset[str], output: Path) -> Inputs:
    """Resolves files, folders (searched with their subfolders) and patterns such as ``a/*.jpg``.

    A file that is named itself is taken whatever its suffix is. Of folders and patterns only files
    with one of `suffixes` are, no hidden ones, and nothing below `output`: that holds the pictures
    of earlier runs.

    Raises:
        DataError: if the inputs stand for no file at all.
    """
    files: dict[Path, None] = {}
    problems: list[str] = []
    for argument in arguments:
        found = _resolve(argument, suffixes, output)
        if not found:
            problems.append(_explain(argument, suffixes))
        files.update(dict.fromkeys(found))
    if not files:
        raise DataError(f"nothing to read: {' '.join(problems)}")
    return Inputs(list(files), problems)


def _resolve(argument: str, suffixes: frozenset[str], output: Path) -> list[Path]:
    path = Path(argument)
    if path.is_file():
        return [path]
    if path.is_dir():
        candidates = [each for each in path.rglob("*") if not _is_hidden(each.relative_to(path))]
    else:
        candidates = [Path(each) for each in glob.glob(argument, recursive=True)]
    return sorted(
        each
        for each in candidates
        if each.suffix.lower() in suffixes and each.is_file() and not _is_below(each, output)
    )


def _explain(argument: str, suffixes: frozenset[str]) -> str:
    if os.path.isdir(argument):
        return f"the folder {argument} has no file that ends in {', '.join(sorted(suffixes))}."
    if glob.has_magic(argument):
        return f"no file matches {argument}."
    return f"{argument} does not exist."


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _is_below(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents
