"""Which images are predicted: files, folders, patterns, lists of paths, or a COCO-format json."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from co_detr.data.coco_file import display_names, is_id, locate_files, read_coco
from co_detr.errors import ConfigError, DataError

_LISTED = 8  # names of files in a message


@dataclass(frozen=True, slots=True)
class ImageInput:
    """An image to be predicted.

    Attributes:
        image_id: in the json that is written.
        path: of the file.
        file_name: in the json that is written.
        picture: file name of the drawn picture; no two images have the same.
        size: (width, height) that an annotation file states; None: not known.
    """

    image_id: int | str
    path: str
    file_name: str
    picture: str
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Inputs:
    """Attributes:
    files: each once, in the order of the command line, sorted within a folder or pattern.
    problems: one sentence for each input that stands for no file.
    passed_over: files of folders and patterns that are of another kind.
    images: what `find_images` makes of the files, or of a json.
    categories: category id -> name of the json that the images come from; {}: it has none, or
        there is no json.
    """

    files: list[Path]
    problems: list[str]
    passed_over: list[Path]
    images: list[ImageInput] = field(default_factory=list)
    categories: Mapping[int | str, str] = field(default_factory=dict)

    def remark(self) -> str:
        """One line about the files that are passed over, of which there have to be some."""
        return (
            f"Passed over {_listed(self.passed_over)} of kinds that are not read; images among "
            "them have to be converted, for example to JPEG."
        )

    def digest(self) -> str:
        """Differs where ids or paths do."""
        hashed = hashlib.sha256()
        for image in self.images:
            hashed.update(f"{image.image_id!r} {image.path!r}\n".encode())
        for path in self.files:
            hashed.update(f"{path}\n".encode())
        return hashed.hexdigest()


def find_images(
    arguments: Sequence[str], suffixes: Collection[str], output: Path, root: str | None = None
) -> Inputs:
    """Resolves what `find_inputs` does, and also lists and annotation files.

    A file that ends in .txt lists paths, one on each line, which stand for what they would stand
    for on the command line; empty lines count for nothing. A file that ends in .json is COCO
    format, has to be the only input, and its image ids are kept. Other images are numbered from 1.

    Args:
        root: folder of the file names in the json; None: that of the json.

    Raises:
        ConfigError: if a json is not the only input, or `root` is given without one.
        DataError: if the inputs stand for no file at all, or a list or json cannot be read.
    """
    annotation_files = [name for name in arguments if _is_file(name, ".json")]
    if annotation_files and len(arguments) > 1:
        raise ConfigError(
            f"{annotation_files[0]} has image ids of its own, so that it must be the only input: "
            "predict the others in another run."
        )
    if annotation_files:
        return _of_annotation_file(annotation_files[0], root)
    if root is not None:
        raise ConfigError(f"--images {root} belongs to a COCO-format json: name one as input.")
    found = find_inputs([*_with_lists(arguments)], suffixes, output)
    pictures = PictureNames()
    images = [
        ImageInput(number, str(path), str(path), pictures.free(path, ".jpg"))
        for number, path in enumerate(found.files, start=1)
    ]
    return replace(found, images=images)


class PictureNames:
    """File names in one folder, none of them twice."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._last: dict[str, int] = {}  # number by stem: frames of many videos have the same names

    def free(self, path: str | Path, suffix: str) -> str:
        """A file name like that of `path`, with a number if another input had the same."""
        stem = Path(path).stem
        key = f"{stem}{suffix}".casefold()  # some systems do not tell A.jpg from a.jpg
        name, number = f"{stem}{suffix}", self._last.get(key, 1)
        while name.casefold() in self._taken:
            number += 1
            name = f"{stem}_{number}{suffix}"
        self._last[key] = number
        self._taken.add(name.casefold())
        return name


def _is_file(name: str, suffix: str) -> bool:
    return name.lower().endswith(suffix) and os.path.isfile(name)


def _with_lists(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments, with what lists name in place of the lists."""
    for argument in arguments:
        if not _is_file(argument, ".txt"):
            yield argument
            continue
        try:
            with open(argument, encoding="utf-8-sig") as file:
                yield from (line.strip() for line in file if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"the list {argument} cannot be read ({error}): write it as text in UTF-8 with one "
                "path on each line."
            ) from error


def _of_annotation_file(annotation_file: str, root: str | None) -> Inputs:
    content = read_coco(annotation_file)
    ids = [image.get("id") for image in content.images]
    names = [image.get("file_name") for image in content.images]
    for image_id, name in zip(ids, names, strict=True):
        if not is_id(image_id) or not isinstance(name, str):
            raise DataError(
                f"an image of {annotation_file} has the id {image_id!r} and the file_name "
                f"{name!r}: each needs both."
            )
    if len(set(ids)) < len(ids):
        raise DataError(f"{annotation_file} has two images with one id: give each its own.")
    if not ids:
        raise DataError(f"{annotation_file} has no images: there is nothing to predict.")
    root = root or os.path.dirname(annotation_file) or "."
    located = locate_files(names, root)
    if not located.paths:
        raise DataError(
            f"none of the images of {annotation_file} is below {root}: name their folder with "
            f"--images{f' ({located.hint()})' * bool(located.hint())}."
        )
    pictures = PictureNames()
    images = [
        ImageInput(
            image["id"],
            os.path.join(root, located.paths.get(name, name)),
            name,
            pictures.free(name, ".jpg"),
            _stated_size(image),
        )
        for image, name in zip(content.images, names, strict=True)
    ]
    return Inputs([], [], [], images, display_names(content.categories))


def _stated_size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    size = (image.get("width"), image.get("height"))
    return size if all(isinstance(side, int) for side in size) else None


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
        is_named = os.path.isfile(argument)
        found, rest = [], []
        for path in _resolve(argument, output):
            (found if is_named or path.suffix.lower() in suffixes else rest).append(path)
        if not found:
            problems.append(_explain(argument, rest))
        files.update(dict.fromkeys(found))
        others.update(dict.fromkeys(rest))
    if not files:
        raise DataError(f"nothing to read: {' '.join(problems)}")
    return Inputs(list(files), problems, [path for path in others if path not in files])


def _resolve(argument: str, output: Path) -> list[Path]:
    """All files, of whatever kind, that an argument stands for."""
    path = Path(argument)
    if path.is_file():
        return [path]
    if path.is_dir():
        candidates = [file for file in path.rglob("*") if not _is_hidden(file.relative_to(path))]
    else:
        candidates = [Path(name) for name in glob.glob(argument, recursive=True)]
    return sorted(path for path in candidates if path.is_file() and not _is_below(path, output))


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
