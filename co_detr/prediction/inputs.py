"""Files that the inputs of a command line stand for."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from co_detr.errors import DataError

_LISTED = 8  # names of files in a message
VIDEOS = frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"))


@dataclass(frozen=True)
class Inputs:
    """Attributes:
    files: each once, in the order of the command line, sorted within a folder or pattern.
    problems: one sentence for each input that stands for no file.
    passed_over: files of folders and patterns that are of another kind.
    """

    files: list[Path]
    problems: list[str]
    passed_over: list[Path]

    def remark(self) -> str:
        """One line about the files that are passed over, of which there have to be some."""
        return (
            f"Passed over {_listed(self.passed_over)} of kinds that are not read; images among "
            "them have to be converted, for example to JPEG."
        )


def find_inputs(arguments: Sequence[str], suffixes: Collection[str], output: Path) -> Inputs:
    """Resolves files, folders (searched with their subfolders) and patterns such as ``a/*.jpg``.

    A file that is named itself is taken whatever its suffix is. Of folders and patterns only files
    with one of `suffixes` are, in upper or lower case, no hidden ones, and nothing below `output`:
    that holds the pictures of earlier runs.

    Raises:
        DataError: if the inputs stand for no file at all.
    """
    files: dict[Path, None] = {}
    others: dict[Path, None] = {}
    problems: list[str] = []
    for argument in arguments:
        candidates = _resolve(argument, output)
        is_named = os.path.isfile(argument)
        found = [each for each in candidates if is_named or each.suffix.lower() in suffixes]
        rest = [each for each in candidates if each not in found]
        if not found:
            problems.append(_explain(argument, rest))
        files.update(dict.fromkeys(found))
        others.update(dict.fromkeys(rest))
    if not files:
        raise DataError(f"nothing to read: {' '.join(problems)}")
    return Inputs(list(files), problems, [each for each in others if each not in files])


def _resolve(argument: str, output: Path) -> list[Path]:
    """All files, of whatever kind, that an argument stands for."""
    path = Path(argument)
    if path.is_file():
        return [path]
    if path.is_dir():
        candidates = [each for each in path.rglob("*") if not _is_hidden(each.relative_to(path))]
    else:
        candidates = [Path(each) for each in glob.glob(argument, recursive=True)]
    return sorted(each for each in candidates if each.is_file() and not _is_below(each, output))


def _explain(argument: str, others: list[Path]) -> str:
    there = f", only {_listed(others)}" if others else ""
    if os.path.isdir(argument):
        return f"the folder {argument} has no file of a kind that is read{there}."
    if glob.has_magic(argument):
        return f"no file of a kind that is read matches {argument}{there}."
    return f"{argument} does not exist."


def _listed(paths: list[Path]) -> str:
    names = ", ".join(path.name for path in paths[:_LISTED])
    more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
    return f"{len(paths)} file{'s' * (len(paths) != 1)} ({names}{more})"


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _is_below(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents
