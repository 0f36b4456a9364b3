"""VOC folders: images, xml files, and lists of names that make up the sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from co_detr.conversion.folders import first_folder, image_files, require_labels
from co_detr.conversion.image_size import ImageSize
from co_detr.conversion.structures import SPLITS, Example, Labels
from co_detr.conversion.text_file import read_text
from co_detr.conversion.voc_labels import VocRules, read_voc_labels
from co_detr.errors import DataError

# The lists of a class, such as cat_train.txt, and some tools have a column behind the name.
_LINE = re.compile(r"(.*?)(\s+-?[01])?")


@dataclass(frozen=True)
class VocLayout:
    """See `Layout`."""

    splits: dict[str, list[Example]]
    class_names: Sequence[str] | None
    orphans: list[Path]
    rules: VocRules

    def read(self, label: Path, size: ImageSize) -> Labels:
        return read_voc_labels(label, size, self.rules)


def find_voc(folder: Path, rules: VocRules, class_names: Sequence[str] | None = None) -> VocLayout:
    """Finds the parts of a VOC data set.

    These are JPEGImages, Annotations and, as far as there are any, the lists train.txt, val.txt
    and test.txt in ImageSets/Main; or folders train, valid and test (or just `folder`) with xml
    files beside the images.

    Raises:
        DataError: if a part is missing.
    """
    if (folder / "Annotations").is_dir():
        splits, orphans = _by_lists(folder)
    else:
        splits, orphans = _by_folders(folder)
    require_labels(splits, "the same name with .xml, in Annotations or beside it")
    return VocLayout(splits, class_names, orphans, rules)


def _by_lists(folder: Path) -> tuple[dict[str, list[Example]], list[Path]]:
    annotations = folder / "Annotations"
    places = (folder / name for name in ("JPEGImages", "images", "Images"))
    images = _by_stem(image_files(first_folder(places) or annotations))
    labels = {path.stem: path for path in annotations.glob("*.xml")}
    lists = first_folder((folder / "ImageSets" / "Main", folder / "ImageSets"))
    splits = {}
    for split, aliases in SPLITS.items():
        files = [lists / f"{alias}.txt" for alias in aliases] if lists else []
        file = next((path for path in files if path.is_file()), None)
        if file:
            stems = dict.fromkeys(_listed_stems(file, images))
            splits[split] = [Example(_the_image(images[s], s), labels.get(s)) for s in stems]
    if not splits:
        stems = sorted(images)
        splits["train"] = [Example(_the_image(images[s], s), labels.get(s)) for s in stems]
    return splits, sorted(path for stem, path in labels.items() if stem not in images)


def _by_folders(folder: Path) -> tuple[dict[str, list[Example]], list[Path]]:
    splits, orphans = {}, []
    for split, aliases in SPLITS.items():
        found = first_folder(folder / alias for alias in aliases)
        if found:
            splits[split], lonely = _beside(found)
            orphans += lonely
    if not splits:
        splits["train"], orphans = _beside(folder)
    return splits, orphans


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
