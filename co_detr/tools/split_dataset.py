"""Divides a COCO-format file by images: into k folds, or into a train and a val set.

Every part gets its share of each class, of objects and of images, as far as whole images, or
groups of images that belong together, allow it. Greedy: the groups that are hardest to place come
first, and each goes where the shares then differ least from what they should be. Source of the
idea: Sechidis et al., "On the Stratification of Multi-Label Data", ECML PKDD 2011; with groups,
scikit-learn's ``StratifiedGroupKFold``.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from tabulate import tabulate

from co_detr.data.coco_file import CocoFile, Entry, display_names, is_id, read_coco, shortened
from co_detr.errors import ConfigError, DataError, WriteError
from co_detr.files import written_whole

GRID_FILE = "grid.yaml"

EPILOG = """
examples:
  five folds             python tools/split_dataset.py my/all.json --output my/folds --folds 5
  train and val          python tools/split_dataset.py my/all.json --output my/split --val 0.2
  frames stay together   ... --group-by video_id
  by the file name       ... --group-by file_name --group-pattern "(.*)_[0-9]+[.]jpg"
  and a grid to train    ... --config-file configs/co_detr_r50.py --images my/images

Exit status: 0, or 2 after an error that is explained in one sentence.
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of tools/split_dataset.py."""
    parser = argparse.ArgumentParser(
        description="Divides a COCO-format file into folds, or into train and val.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("annotations", metavar="FILE", help="COCO-format json")
    add("--output", type=Path, required=True, metavar="DIR", help="fold1/train.json and so on")
    parts = parser.add_mutually_exclusive_group(required=True)
    parts.add_argument("--folds", type=int, metavar="K", help="each image is in one val set of K")
    parts.add_argument("--val", type=float, metavar="PART", help="part of the images that is val")
    add("--group-by", metavar="KEY", help="images with the same value of this key stay together")
    add("--group-pattern", metavar="REGEX", help="its first (...) in that value is the group")
    add("--seed", type=int, default=0, help="of the division (default: 0)")
    add("--config-file", metavar="FILE", help="of the models that grid.yaml trains on the folds")
    add("--images", metavar="DIR", help="of the images, for grid.yaml")
    add("--force", action="store_true", help="replace files that are there")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Divides, writes the files, and prints what each has.

    Raises:
        UserError: if an argument or the file is wrong.
    """
    content = read_coco(options.annotations)
    targets = _targets(options)
    groups = group_images(content, options.group_by, options.group_pattern)
    parts = divide(content, groups, targets, options.seed)
    if options.folds:
        sets = {
            f"fold{number}/{name}": part
            for number, val in enumerate(parts, start=1)
            for name, part in (("train", set().union(*parts) - val), ("val", val))
        }
    else:
        sets = dict(zip(("train", "val"), parts, strict=True))
    files = {name: options.output / f"{name}.json" for name in sets}
    grid = options.output / GRID_FILE if options.config_file else None
    there = [path for path in (*files.values(), *([grid] if grid else [])) if path.exists()]
    if there and not options.force:
        raise ConfigError(f"{there[0]} exists: choose another --output, or add --force.")
    counts = {name: count(content, images) for name, images in sets.items()}
    for name, images in sets.items():
        write_json(chosen_images(content, images), files[name])
    print(_table(content, counts))
    for note in _notes(content, groups, parts, counts):
        print(f"note: {note}")
    print(f"Wrote {len(files)} files below {options.output}")
    if grid is not None:
        _write_grid(grid, files, options)
        print(_next_commands(grid, options))


def _targets(options: argparse.Namespace) -> list[float]:
    """The share of the images that each part should have."""
    if options.folds is not None:
        if options.folds < 2:
            raise ConfigError(f"--folds {options.folds} must be at least 2.")
        if bool(options.config_file) != bool(options.images):
            raise ConfigError("--config-file and --images make grid.yaml together: add the other.")
        return [1 / options.folds] * options.folds
    if options.config_file or options.images:
        raise ConfigError("--config-file and --images are for --folds: leave them out.")
    if not 0 < options.val < 1:
        raise ConfigError(f"--val {options.val:g} must be between 0 and 1, for example 0.2.")
    return [1 - options.val, options.val]


def group_images(
    content: CocoFile, key: str | None = None, pattern: str | None = None
) -> dict[str, list[int | str]]:
    """Ids of the images that have to stay together, by the name of the group.

    Args:
        key: of an entry of `images`; None: every image is a group of its own.
        pattern: regular expression with one group ``(...)``, found in the value of `key`; None:
            the whole value counts.

    Raises:
        DataError: if an image lacks the key, does not fit the pattern, or repeats an id.
        ConfigError: if the pattern is wrong.
    """
    times = Counter(image.get("id") for image in content.images)
    wrong = [key for key, number in times.items() if number > 1 or not is_id(key)]
    if wrong:
        raise DataError(
            f"'images' of {content.path} has the id {wrong[0]!r}, which is missing, no id, or "
            "there twice: give every image its own."
        )
    if key is None:
        if pattern is not None:
            raise ConfigError("--group-pattern needs --group-by, for example file_name.")
        return {str(image["id"]): [image["id"]] for image in content.images}
    try:
        expression = None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"--group-pattern {pattern!r} is no regular expression: {error}."
        ) from None
    if expression is not None and expression.groups < 1:
        raise ConfigError(f"--group-pattern {pattern!r} has no (...) around what names a group.")
    groups: dict[str, list[int | str]] = defaultdict(list)
    for image in content.images:
        name = f"image {image.get('file_name', image['id'])} of {content.path}"
        if image.get(key) is None:
            raise DataError(f"{name} has no {key!r} to be grouped by: add it to all images.")
        value = str(image[key])
        if expression is not None:
            found = expression.search(value)
            if found is None:
                raise DataError(f"{name}: {key} {value!r} does not fit the pattern {pattern!r}.")
            value = str(found[1])
        groups[value].append(image["id"])
    return dict(groups)


def divide(
    content: CocoFile,
    groups: Mapping[str, Sequence[int | str]],
    targets: Sequence[float],
    seed: int = 0,
) -> list[set[int | str]]:
    """Image ids of each part. The same arguments give the same parts.

    Args:
        groups: of `group_images`.
        targets: share of each part; they add up to 1.

    Raises:
        DataError: if there are fewer groups than parts, or a part remains empty.
    """
    if len(groups) < len(targets):
        raise DataError(
            f"{content.path} has {len(groups)} groups of images for {len(targets)} parts: ask for "
            "fewer parts, or group by another key."
        )
    goal = np.array(targets)
    shares = _shares(content, groups)
    order = list(shares)
    random.Random(seed).shuffle(order)  # among equals, which sorting leaves as they are
    order.sort(key=lambda name: -max(shares[name][1]))
    has = np.zeros((len(targets), 3 + len(content.categories)))
    parts: list[set[int | str]] = [set() for _ in targets]
    for position, name in enumerate(order):
        columns, added = shares[name]
        # By how much the squares of (share - goal) / sqrt(goal) grow, summed over the columns.
        growth = (added * (2 * (has[:, columns] - goal[:, None]) + added)).sum(1) / goal
        empty = [not part for part in parts]
        if len(order) - position <= sum(empty):  # the last groups are for parts without any
            growth = np.where(empty, growth, np.inf)
        best = int(growth.argmin())
        has[best, columns] += added
        parts[best].update(groups[name])
    return parts


def _shares(
    content: CocoFile, groups: Mapping[str, Sequence[int | str]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By group, the columns in which it has something, and its share of the whole there.

    Columns: images, those without objects, objects, and objects of each class.
    """
    column = {category["id"]: 3 + i for i, category in enumerate(content.categories)}
    group_of = {image: name for name, images in groups.items() for image in images}
    counts: dict[str, Counter[int]] = {name: Counter({0: len(i)}) for name, i in groups.items()}
    empty = set(group_of)
    for annotation in content.annotations:
        image, category = annotation.get("image_id"), annotation.get("category_id")
        if image not in group_of or category not in column:
            raise DataError(
                f"annotation {annotation.get('id')!r} of {content.path} has image_id {image!r} "
                f"and category_id {category!r}, of which one is unknown: correct it."
            )
        if is_object(annotation):
            counts[group_of[image]].update((2, column[category]))
            empty.discard(image)
    for image in empty:
        counts[group_of[image]][1] += 1
    whole: Counter[int] = Counter()
    for own in counts.values():
        whole.update(own)
    return {
        name: (np.array(list(own)), np.array([own[key] / whole[key] for key in own]))
        for name, own in counts.items()
    }


def is_object(annotation: Entry) -> bool:
    """Whether it is counted: crowd regions are neither learned nor evaluated."""
    return not annotation.get("iscrowd", 0)


def chosen_images(content: CocoFile, images: set[int | str]) -> dict[str, object]:
    """A COCO-format file of these images, with their ids, all categories, and what else it has."""
    return {
        **content.others,
        "images": [image for image in content.images if image["id"] in images],
        "annotations": [a for a in content.annotations if a["image_id"] in images],
        "categories": content.categories,
    }


def write_json(content: object, path: Path) -> None:
    """Writes a file, whole or not at all, and its folder.

    Raises:
        WriteError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(str(path)) as file:
            json.dump(content, file)
    except OSError as error:
        raise WriteError(f"{path} cannot be written ({error.strerror}): name another.") from error


@dataclass(frozen=True)
class Count:
    """What a set has: images, those without an object, and objects of each category id."""

    images: int
    empty: int
    objects: Counter[int | str]


def count(content: CocoFile, images: set[int | str]) -> Count:
    """Counts a part of a file."""
    objects = [a for a in content.annotations if is_object(a) and a["image_id"] in images]
    shown = {annotation["image_id"] for annotation in objects}
    by_class = Counter(annotation["category_id"] for annotation in objects)
    return Count(len(images), len(images - shown), by_class)


def _table(content: CocoFile, counts: Mapping[str, Count]) -> str:
    names = display_names(content.categories)
    shown = list(names)[:12]  # columns that a terminal bears
    header = ["", "images", "empty", "objects", *(names[key] for key in shown)]
    rows = [
        [name, c.images, c.empty, c.objects.total(), *(c.objects[key] for key in shown)]
        for name, c in counts.items()
    ]
    more = f"\n(and {len(names) - len(shown)} more classes)" if len(names) > len(shown) else ""
    return tabulate(rows, header, tablefmt="github") + more


def _notes(
    content: CocoFile,
    groups: Mapping[str, Sequence[int | str]],
    parts: Sequence[set[int | str]],
    counts: Mapping[str, Count],
) -> list[str]:
    """What the division could not do."""
    notes = []
    largest = max(groups, key=lambda name: len(groups[name]))
    if len(groups[largest]) > min(map(len, parts)) and len(groups) < len(content.images):
        notes.append(
            f"group {largest!r} has {len(groups[largest])} of {len(content.images)} images, more "
            "than a part: parts cannot be equal"
        )
    names = display_names(content.categories)
    for name, own in counts.items():
        absent = [names[key] for key in names if not own.objects[key]]
        if absent:
            notes.append(f"{name} has no object of {shortened(absent)}")
    return notes


def _write_grid(path: Path, files: Mapping[str, Path], options: argparse.Namespace) -> None:
    """A grid for tools/ablate.py whose variants are the folds."""
    from co_detr.engine.overrides import text_override

    grid = {
        "config": options.config_file,
        "variants": [
            {
                "name": f"fold{number}",
                "overrides": [
                    text_override("data.train", str(files[f"fold{number}/train"])),
                    text_override("data.train_images", options.images),
                    text_override("data.val", str(files[f"fold{number}/val"])),
                    text_override("data.val_images", options.images),
                ],
            }
            for number in range(1, options.folds + 1)
        ],
    }
    with written_whole(str(path)) as file:
        yaml.safe_dump(grid, file, sort_keys=False)


def _next_commands(grid: Path, options: argparse.Namespace) -> str:
    runs = f"output/{options.output.name}"
    results = [
        f"{runs}/fold{number}/seed0/coco_instances_results.json"
        for number in range(1, options.folds + 1)
    ]
    train = ["python", "tools/ablate.py", "--grid", str(grid), "--output-dir", runs]
    merge = ["python", "tools/combine.py", *results, "--folds"]
    merge += ["--annotations", options.annotations, "--output", f"{runs}/out_of_fold.json"]
    return f"Train on the folds:\n  {shlex.join(train)}\nand join them:\n  {shlex.join(merge)}"
