"""VOC folders: images, xml files, and lists of names that make up the sets."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from co_detr.conversion.folders import find_splits, first_folder, image_files
from co_detr.conversion.image_size import ImageSize
from co_detr.conversion.structures import SPLITS, Example, Labels
from co_detr.conversion.text_file import read_text
from co_detr.conversion.voc_labels import VocRules, read_voc_labels
from co_detr.errors import DataError

_EXPECTED = "the same name with .xml, in Annotations or beside it"
# The lists of a class, such as cat_train.txt, and some tools have a column behind the name.
_LINE = re.compile(r"(.*?)(\s+-?[01])?")


@dataclass(frozen=True)
class VocLayout:
    """See `Layout`."""

    splits: dict[str, list[Example]]
    class_names: Sequence[str] | None
    orphans: list[Path]
    notes: list[str]
    rules: VocRules

    def read(self, label: Path, size: ImageSize) -> Labels:
        return read_voc_labels(label, size, self.rules)


def find_voc(
    folder: Path,
    rules: VocRules,
    class_names: Sequence[str] | None = None,
    optional: Collection[str] = ("test",),
) -> VocLayout:
    """Finds the parts of a VOC data set.

    These are JPEGImages, Annotations and, as far as there are any, the lists train.txt, val.txt
    and test.txt in ImageSets/Main; or folders train, valid and test (or just `folder`) with xml
    files beside the images.

    Args:
        optional: see `find_splits`.

    Raises:
        DataError: if a part is missing.
    """
    notes: list[str] = []
    if (folder / "Annotations").is_dir():
        find, everything, orphans = _by_lists(folder)
    else:
        find, everything, orphans = _by_folders(folder)
    splits = find_splits(find, _EXPECTED, optional, notes)
    if not splits and not notes:
        splits = find_splits({"train": everything()}.get, _EXPECTED, (), notes)
    return VocLayout(splits, class_names, orphans, notes, rules)


_Find = Callable[[str], list[Example] | None]


def _by_lists(folder: Path) -> tuple[_Find, Callable[[], list[Example]], list[Path]]:
    """What finds a set, what gives all images as one, and labels without an image."""
    annotations = folder / "Annotations"
    places = (folder / name for name in ("JPEGImages", "images", "Images"))
    images = _by_stem(image_files(first_folder(places) or annotations))
    labels = {path.stem: path for path in annotations.glob("*.xml")}
    lists = first_folder((folder / "ImageSets" / "Main", folder / "ImageSets"))

    def examples(stems: Iterable[str]) -> list[Example]:
        return [Example(_the_image(images[stem], stem), labels.get(stem)) for stem in stems]

    def find(split: str) -> list[Example] | None:
        files = [lists / f"{alias}.txt" for alias in SPLITS[split]] if lists else []
        file = next((path for path in files if path.is_file()), None)
        return file and examples(dict.fromkeys(_listed_stems(file, images)))

    orphans = sorted(path for stem, path in labels.items() if stem not in images)
    return find, lambda: examples(sorted(images)), orphans


def _by_folders(folder: Path) -> tuple[_Find, Callable[[], list[Example]], list[Path]]:
    """As `_by_lists`; the labels without an image are known when the sets are found."""
    orphans: list[Path] = []

    def examples(place: Path) -> list[Example]:
        found, lonely = _beside(place)
        orphans.extend(lonely)
        return found

    def find(split: str) -> list[Example] | None:
        place = first_folder(folder / alias for alias in SPLITS[split])
        return place and examples(place)

    return find, lambda: examples(folder), orphans


def _beside(folder: Path) -> tuple[list[Example], list[Path]]:
    """The images of a folder with the xml files beside them, and the xml files without image."""
    images = image_files(folder)
    labels = {image: image.with_suffix(".xml") for image in images}
    used = set(labels.values())
    orphans = sorted(path for path in folder.rglob("*.xml") if path not in used)
    return [Example(i, label if label.is_file() else None) for i, label in labels.items()], orphans


def _by_stem(images: list[Path]) -> dict[str, list[Path]]:
    by_stem: dict[str, list[Path]] = {}
    for path in images:
        by_stem.setdefault(path.stem, []).append(path)
    return by_stem


def _the_image(paths: list[Path], stem: str) -> Path:
    if len(paths) > 1:
        names = " and ".join(path.name for path in paths)
        raise DataError(f"{stem} could be {names} in {paths[0].parent}: remove or rename one.")
    return paths[0]


def _listed_stems(file: Path, images: dict[str, list[Path]]) -> list[str]:
    stems = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        choices = (name, _LINE.fullmatch(name)[1], Path(name).stem)
        stem = next((each for each in choices if each in images), None)
        if stem is None:
            raise DataError(
                f"{file} line {number} names {name}, but there is no image of that name: add it or "
                "remove the line."
            )
        stems.append(stem)
    return stems
