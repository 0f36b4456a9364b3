"""Preflight of one annotation file: everything that can be seen without opening an image."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from numbers import Real
from typing import Any

from co_detr.data.boxes import BoxChecker
from co_detr.data.preflight_report import SplitReport

Entry = dict[str, Any]
_IDS = "use whole numbers as ids, and text as names"


def check_annotations(
    report: SplitReport, content: dict[str, list[Entry]], invalid_boxes: str
) -> list[Entry]:
    """Fills `report` from the content of an annotation file.

    Args:
        content: the lists `images`, `annotations` and `categories` (see `read_coco`).
        invalid_boxes: "error" or "skip", what `load_coco` does with boxes without area.

    Returns:
        The entries of `images` that can be used.
    """
    images = _check_images(report, content["images"])
    _check_categories(report, content["categories"])
    _check_annotations(report, content["annotations"], images, invalid_boxes)
    return list(images.values())


def _check_images(report: SplitReport, entries: list[Entry]) -> dict[int | str, Entry]:
    report.images = len(entries)
    if not entries:
        report.add("error", ["'images' is []"], "empty list of images", "add the images")
    needed = ("id", "file_name", "height", "width")
    complete = _complete(report, "images", entries, needed)
    good_ids = [image for image in complete if _is_id(image["id"])]
    report.add("error", _names(complete, good_ids), "images whose id is no number or text", _IDS)
    if len({type(image["id"]) for image in good_ids}) > 1:
        mixed = [f"{good_ids[0]['id']!r} beside text or numbers"]
        report.add("error", mixed, "mix of numbers and text as image ids", _IDS)
        good_ids = []
    named = [image for image in good_ids if _is_utf8(image["file_name"])]
    report.add(
        "error",
        _names(good_ids, named),
        "images whose file_name is not UTF-8 text",
        "rename the files and write the json as UTF-8",
    )
    sized = [image for image in named if _is_length(image["width"], image["height"])]
    report.add(
        "error",
        _names(named, sized),
        "images whose width or height is not a positive number",
        "write their true size",
    )
    by_id = {image["id"]: image for image in sized}
    repeated = _repeated(image["id"] for image in sized)
    report.add("error", repeated, "image ids that occur twice", "make the ids unique")
    names = _repeated(image["file_name"] for image in sized)
    report.add("warning", names, "image files that are listed twice", "list each file once")
    return by_id


def _check_categories(report: SplitReport, entries: list[Entry]) -> None:
    if not entries:
        report.add("error", ["'categories' is []"], "empty list of categories", "add the classes")
    complete = _complete(report, "categories", entries, ("id", "name"))
    usable = [entry for entry in complete if _is_id(entry["id"]) and _is_utf8(str(entry["name"]))]
    bad = [f"category {entry['id']}" for entry in complete if entry not in usable]
    if len({type(entry["id"]) for entry in usable}) > 1:
        bad, usable = ["numbers beside text"], []
    report.add("error", bad, "categories with an unusable id or name", _IDS)
    report.categories = sorted((entry["id"], str(entry["name"])) for entry in usable)
    repeated = _repeated(key for key, _ in report.categories)
    report.add("error", repeated, "category ids that occur twice", "make the ids unique")
    report.add(
        "warning",
        _repeated(report.class_names),
        "category names that occur twice",
        "each is a class of its own; merge them if they mean the same",
    )


def _check_annotations(
    report: SplitReport,
    entries: list[Entry],
    images: dict[int | str, Entry],
    invalid_boxes: str,
) -> None:
    complete = _complete(report, "annotations", entries, ("image_id", "category_id", "bbox"))
    _check_references(report, complete, images)
    ids = [each["id"] if _is_id(each.get("id")) else "missing" for each in complete]
    if "missing" in ids:
        ids.append("missing")  # one without an id is worth a warning, too
    report.add(
        "warning",
        _repeated(ids),
        "annotation ids that occur twice or are missing",
        "numbered anew for the evaluation",
    )
    bad_crowds = [_name(each) for each in complete if each.get("iscrowd", 0) not in (0, 1)]
    report.add("error", bad_crowds, "annotations whose iscrowd is not 0 or 1", "write 0 or 1")
    names = dict(report.categories)
    known = [
        each
        for each in complete
        if _known(each["image_id"], images) and _known(each["category_id"], names)
    ]
    good = _check_boxes(report, known, images, invalid_boxes)
    _count_objects(report, good, images)


def _check_references(
    report: SplitReport, entries: list[Entry], images: dict[int | str, Entry]
) -> None:
    # With a bad list of images, every annotation would be reported: the images come first.
    if len(images) == report.images:
        report.add(
            "error",
            [
                f"{_name(each)}, image_id {each['image_id']}"
                for each in entries
                if not _known(each["image_id"], images)
            ],
            "annotations of an image_id that is not in 'images'",
            "add the images or remove the annotations",
        )
    names = dict(report.categories)
    report.add(
        "error",
        [
            f"{_name(each)}, category_id {each['category_id']}"
            for each in entries
            if not _known(each["category_id"], names)
        ],
        "annotations of a category_id that is not in 'categories'",
        "add the categories or correct the ids (are they shifted, from 0 against from 1?)",
    )


def _check_boxes(
    report: SplitReport,
    entries: list[Entry],
    images: dict[int | str, Entry],
    invalid_boxes: str,
) -> list[Entry]:
    """Returns the annotations whose box has an area inside its image."""
    boxes = BoxChecker(report.file, "skip")
    good = [each for each in entries if boxes.clip(each, images[each["image_id"]]) is not None]
    by_kind: dict[str, list[str]] = {}
    for skipped in boxes.skipped:
        by_kind.setdefault(skipped.kind, []).append(skipped.where)
    for kind, cases in by_kind.items():
        if invalid_boxes == "skip":
            report.add("warning", cases, f"boxes that {kind}", "left out")
        else:
            mend = "correct or remove them, or set data.invalid_boxes=skip to leave them out"
            report.add("error", cases, f"boxes that {kind}", mend)
    report.add("warning", boxes.clipped, "boxes that are partly outside their image", "clipped")
    places = _repeated((each["image_id"], each["category_id"], *each["bbox"]) for each in good)
    report.add("warning", places, "boxes that occur twice (image, category, box)", "remove them")
    return good


def _count_objects(report: SplitReport, good: list[Entry], images: dict[int | str, Entry]) -> None:
    objects = [each for each in good if not each.get("iscrowd", 0)]
    report.crowd, report.boxes = len(good) - len(objects), len(objects)
    report.empty = len(images) - len({each["image_id"] for each in objects})
    if not objects:
        purpose = "learn from" if report.split == "train" else "evaluate on"
        none = [f"all {len(images)} images are empty"] if images else []
        mend = "annotate objects, or give the right file"
        report.add("error", none, f"no box to {purpose}", mend)
        return
    used = {each["category_id"] for each in objects}
    unused = [name for key, name in report.categories if key not in used]
    effect = "they cannot be learned" if report.split == "train" else "their AP is undefined"
    report.add("warning", unused, "classes without a box", effect)


def _complete(
    report: SplitReport, key: str, entries: list[Entry], needed: tuple[str, ...]
) -> list[Entry]:
    lacking = [
        f"{_name(entry)} has no {' and no '.join(each for each in needed if each not in entry)}"
        for entry in entries
        if not set(needed) <= entry.keys()
    ]
    report.add("error", lacking, f"entries of '{key}' that lack a key", "add it")
    return [entry for entry in entries if set(needed) <= entry.keys()]


def _name(entry: Entry) -> str:
    return str(entry.get("file_name") or entry.get("name") or f"id {entry.get('id')}")


def _names(entries: list[Entry], without: list[Entry]) -> list[str]:
    """Names of the entries that are not in `without`."""
    kept = {id(entry) for entry in without}
    return [_name(entry) for entry in entries if id(entry) not in kept]


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _known(key: Any, among: dict[Any, Any]) -> bool:
    return _is_id(key) and key in among


def _is_utf8(text: Any) -> bool:
    if not isinstance(text, str):
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # "\udce9": how Python and json carry bytes that are not UTF-8
        return False
    return True


def _is_length(*values: Any) -> bool:
    return all(isinstance(each, Real) and math.isfinite(each) and each > 0 for each in values)


def _repeated(values: Iterable[Any]) -> list[str]:
    return [str(value) for value, count in Counter(values).items() if count > 1]
