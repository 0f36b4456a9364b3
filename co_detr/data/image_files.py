"""Where the image files are that an annotation file names."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from urllib.parse import unquote

_MOST_FOLDERS = 300  # that are searched for a hint


@dataclass(frozen=True)
class LocatedFiles:
    """Files that names stand for.

    Attributes:
        root: folder that paths are relative to.
        paths: name -> path below `root`, of all that were found.
        missing: names that no file was found for.
        shared: those of `missing` that would stand for one file together with another name.
    """

    root: str
    paths: dict[str, str]
    missing: list[str]
    shared: list[str]

    @property
    def moved(self) -> list[str]:
        """Names whose file is not where they say."""
        return [name for name, path in self.paths.items() if name != path]

    def hint(self) -> str:
        """What could be behind the first missing file: part of a sentence, "" without an idea."""
        if not self.missing:
            return ""
        name = self.missing[0]
        if name in self.shared:
            return f"{name!r} and another name lead to one file"
        path = _similar_file(name, self.root)
        if path is None:
            return ""
        folder = _folder_above(path, name)
        if folder is not None:
            return f"{name!r} would be found in the directory {folder}"
        return f"{path} has a similar name"


def locate_files(names: Iterable[str], root: str) -> LocatedFiles:
    """Looks names of an annotation file up.

    A name that leads to no file may come from another system or machine: backslashes, escapes of
    URLs (%20), other letter case or another Unicode form, and folders in front that are not there
    (C:\\data\\a.jpg, /home/other/a.jpg) are overlooked if exactly one file is left then. Files in
    folders that a name does not have are never taken: they may be other images of that name.
    """
    folder = _Folder(root)
    found = {name: folder.find(name) for name in dict.fromkeys(names)}
    wanted = Counter(found.values())
    shared = [n for n, path in found.items() if path not in (None, n) and wanted[path] > 1]
    for name in shared:
        found[name] = None
    return LocatedFiles(
        root=root,
        paths={name: path for name, path in found.items() if path is not None},
        missing=[name for name, path in found.items() if path is None],
        shared=shared,
    )


class _Folder:
    """Lists every directory once instead of a look-up per file: large sets often lie on network
    disks."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._names: dict[str, set[str]] = {}
        self._folded: dict[str, dict[str, list[str]]] = {}

    def find(self, name: str) -> str | None:
        """The path below the root that a name stands for."""
        directory, base = os.path.split(name)
        if base in self._list(directory) or os.path.isfile(os.path.join(self.root, name)):
            return name
        parts = _parts(name)
        ways = (self._follow(parts[start:]) for start in range(len(parts)))
        return next((path for path in ways if path is not None), None)

    def _follow(self, parts: list[str]) -> str | None:
        path = ""
        for part in parts:
            names = self._list(path)
            if part not in names:
                similar = self._fold(path).get(_folded(part), [])
                if len(similar) != 1:
                    return None
                part = similar[0]
            path = os.path.join(path, part)
        return path if os.path.isfile(os.path.join(self.root, path)) else None

    def _list(self, directory: str) -> set[str]:
        if directory not in self._names:
            path = os.path.join(self.root, directory)
            try:
                self._names[directory] = set(os.listdir(path))
            except OSError:  # no directory, or not for us: then nothing is found in it
                self._names[directory] = set()
        return self._names[directory]

    def _fold(self, directory: str) -> dict[str, list[str]]:
        if directory not in self._folded:
            folded: dict[str, list[str]] = {}
            for name in sorted(self._list(directory)):
                folded.setdefault(_folded(name), []).append(name)
            self._folded[directory] = folded
        return self._folded[directory]


def _parts(name: str) -> list[str]:
    """Folders and file of a path or URL in any notation."""
    if "://" in name:
        name = name.partition("://")[2].partition("?")[0]
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unquote(name)).casefold().strip()


def _similar_file(name: str, root: str) -> str | None:
    """A file of that name, or else of that name with another ending, near the root."""
    parts = _parts(name)
    if not parts:
        return None
    wanted = _folded(parts[-1])
    stem, other = os.path.splitext(wanted)[0], None
    for top in (root, os.path.dirname(os.path.abspath(root))):
        for folder, _, files in islice(os.walk(top), _MOST_FOLDERS):
            for file in sorted(files):
                if _folded(file) == wanted:
                    return os.path.join(folder, file)
                if other is None and os.path.splitext(_folded(file))[0] == stem:
                    other = os.path.join(folder, file)
    return other


def _folder_above(path: str, name: str) -> str | None:
    """The directory in which `name` leads to `path`; None if its own folders are others."""
    parts, wanted = os.path.abspath(path).split(os.sep), _parts(name)
    if list(map(_folded, parts[-len(wanted) :])) != list(map(_folded, wanted)):
        return None
    return os.sep.join(parts[: -len(wanted)])
