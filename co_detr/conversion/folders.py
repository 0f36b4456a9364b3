"""Finding image files, and sharing them out when a folder has no val set."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from co_detr.conversion.structures import SPLITS, Example
from co_detr.data.images import image_suffixes
from co_detr.errors import ConfigError, DataError


def image_files(folder: Path) -> list[Path]:
    """Image files of a folder and its subfolders, sorted; hidden ones are left out."""
    suffixes = image_suffixes()
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def first_folder(candidates: Iterable[Path]) -> Path | None:
    """The first that exists."""
    return next((path for path in candidates if path.is_dir()), None)


def places_of(entry: str, folders: Iterable[Path]) -> Iterator[Path]:
    """Where a path in a file may lead, the likeliest first.

    Lists and yaml files are written on other systems (backslashes) and machines: without the
    folders in front, which are not there, a path may be right. A last part that only says "images"
    is no trace of it.
    """
    path = entry.replace("\\", "/")
    folders = list(folders)
    yield from (folder / path for folder in folders)
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for start in range(len(parts)):
        if parts[start:] != ["images"] or start == 0:
            yield from (folder.joinpath(*parts[start:]) for folder in folders)


def find_splits(
    find: Callable[[str], list[Example] | None],
    expected: str,
    optional: Collection[str],
    notes: list[str],
) -> dict[str, list[Example]]:
    """Looks for train, val and test.

    Args:
        find: examples of a set; None: there is none.
        expected: where label files should be, for a message.
        optional: sets that are left out if something is wrong with where they are.
        notes: gets a sentence for each of those.

    Raises:
        DataError: if `find` does, or if no image of a set has a label file: the search must have
            failed. A test set need not have labels.
    """
    splits = {}
    for split in SPLITS:
        try:
            examples = find(split)
            if examples is None:
                continue
            _require_labels(split, examples, expected)
        except DataError as error:
            if split in optional:
                notes.append(f"the {split} set is left out: {error.sentence}")
                continue
            if split == "val":
                advice = "or add --val-fraction 0.2 to draw it from train"
                raise DataError(f"{error.sentence.rstrip('.')}, {advice}.") from error
            raise
        splits[split] = examples
    return splits


def _require_labels(split: str, examples: list[Example], expected: str) -> None:
    if not examples:
        raise DataError(f"the {split} set has no image: add images, or remove the set.")
    if split != "test" and all(example.label is None for example in examples):
        raise DataError(
            f"none of the {len(examples)} {split} images has a label file ({expected}, for "
            f"{examples[0].image}): put them there."
        )


def share_out(
    splits: dict[str, list[Example]], val_fraction: float | None, folder: Path
) -> dict[str, list[Example]]:
    """The splits with a val set, which is drawn from train where there is none.

    The same images are drawn each time.

    Raises:
        ConfigError: if `val_fraction` is missing, superfluous or leaves a set empty.
        DataError: if there is no train set.
    """
    if "train" not in splits:
        raise DataError(f"{folder} has no train set (only {', '.join(splits) or 'none'}): add it.")
    if "val" in splits:
        if val_fraction is not None:
            raise ConfigError(f"{folder} has a val set: leave --val-fraction out.")
        return splits
    if val_fraction is None:
        raise ConfigError(
            f"{folder} has no val set: add --val-fraction 0.2 to draw a fifth of the train images "
            "for it."
        )
    examples = splits["train"]
    count = round(val_fraction * len(examples)) if 0 < val_fraction < 1 else 0
    if not 0 < count < len(examples):
        raise ConfigError(
            f"--val-fraction {val_fraction} of {len(examples)} images leaves a set empty: choose "
            "another."
        )
    drawn = set(random.Random(0).sample(range(len(examples)), count))
    train = [each for index, each in enumerate(examples) if index not in drawn]
    val = [each for index, each in enumerate(examples) if index in drawn]
    return {**splits, "train": train, "val": val}
