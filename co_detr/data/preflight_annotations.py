"""The report of a preflight, and what it says of an annotation file without looking at images.

Masks are looked at one by one, against the boxes of their objects, and over the whole file. Boxes
have a file of their own, `preflight_boxes`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from co_detr.data.coco import ROUNDING_PIXELS
from co_detr.data.coco_file import CocoFile, Entry, display_names, is_id, is_number
from co_detr.data.segmentation import MaskFlaw, check_mask, extent_of
from co_detr.errors import DataError

Level = Literal["error", "warning"]
_LONGEST_LIST = 12  # class names shown before "and N more"
Images = Mapping[int | str, Entry]
_IDS = "use whole numbers as ids, and text as names"
# Numbers that all are at most this are in no pixels, as in the preflight of boxes.
_LARGEST_PART = 1.1
# A mask whose own box has less in common with that of the object (IoU) is not of this object.
_FEWEST_SHARED = 0.5
# Few masks may be wrong one by one, and say nothing about the file.
_FEWEST = 10


@dataclass(frozen=True)
class Finding:
    """One kind of defect in one split.

    Attributes:
        level: "error" stops the run; a "warning" is harmless or was repaired.
        split: "train" or "val".
        count: how many cases.
        what: the defect, in the plural.
        first: the first case.
        remedy: what to do (error), or what was done and what to look at (warning).
    """

    level: Level
    split: str
    count: int
    what: str
    first: str
    remedy: str

    def sentence(self) -> str:
        return f"{self.what}: {self.count} (the first: {self.first}); {self.remedy}"


@dataclass
class SplitReport:
    """Counts of one annotation file, and what is wrong with it.

    Attributes:
        split: "train" or "val".
        file: path of the annotation file.
        images: number of images; `empty` of them have no box to learn or evaluate.
        boxes: usable boxes that are no crowd regions; `crowd` is the number of those.
        masks: how many of the boxes have a usable mask; None: masks are not read.
        sampled: how many objects `masks` is of, where not all were looked at; None: all.
        categories: (id in the file, name), in the order of the ids.
        decoded: number of images that were decoded.
        values: how values of more than 8 bits are read, one sentence for each range.
        sizes: how large objects are for the model, one sentence.
        suspicion: level of what is only likely, seen over the whole file.
    """

    split: str
    file: str
    images: int = 0
    empty: int = 0
    boxes: int = 0
    crowd: int = 0
    masks: int | None = None
    sampled: int | None = None
    categories: list[tuple[int | str, str]] = field(default_factory=list)
    decoded: int = 0
    values: list[str] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    suspicion: Level = "error"
    findings: list[Finding] = field(default_factory=list)

    @property
    def class_names(self) -> list[str]:
        """Names as the model knows them, see `display_names`."""
        entries = [{"id": key, "name": name} for key, name in self.categories]
        return list(display_names(entries).values())

    def add(self, level: Level, cases: Sequence[str], what: str, remedy: str) -> None:
        """Notes a defect if there are cases of it."""
        if cases:
            self.findings.append(Finding(level, self.split, len(cases), what, cases[0], remedy))


@dataclass(frozen=True)
class PreflightReport:
    """The reports of all splits that were inspected."""

    splits: list[SplitReport]

    @property
    def findings(self) -> list[Finding]:
        """Errors first, otherwise in the order of the checks."""
        every = [finding for split in self.splits for finding in split.findings]
        return sorted(every, key=lambda finding: finding.level)

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    def text(self) -> str:
        """Tables of counts and of findings, one per line."""
        header = ("", "images", "empty", "boxes", "crowd", "masks", "classes", "decoded", "file")
        rows = [header]
        for split in self.splits:
            counts = (split.images, split.empty, split.boxes, split.crowd)
            counts += ("-" if split.masks is None else split.masks,)
            counts += (len(split.categories), split.decoded)
            rows.append((split.split, *map(str, counts), split.file))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += [f"classes: {_listed(self.splits[0].categories)}"]
        lines += [f"values: {value}" for split in self.splits for value in split.values]
        lines += [f"{split.split}: {size}" for split in self.splits for size in split.sizes]
        lines += [
            f"{split.split}: masks of {split.sampled} objects of {split.boxes + split.crowd} were "
            "looked at (all with data.preflight.images=all); loading looks at every mask it needs"
            for split in self.splits
            if split.sampled is not None
        ]
        lines += [
            f"{finding.level:7}  {finding.split:5}  {finding.sentence()}"
            for finding in self.findings
        ]
        if not self.findings:
            lines.append("no defects found")
        return printable("\n".join(lines))

    def raise_on_errors(self) -> None:
        """Raises a DataError with the first error, and the number of the others."""
        if not self.errors:
            return
        first = self.errors[0]
        file = next(split.file for split in self.splits if split.split == first.split)
        others = len(self.errors) - 1
        more = f" ({others} more kind{'s' * (others > 1)} of error above)" if others else ""
        raise DataError(printable(f"data.{first.split} {file} has {first.sentence()}{more}."))


def printable(text: str) -> str:
    """Text that any terminal can print: file names that are not UTF-8 get escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _listed(categories: list[tuple[int | str, str]]) -> str:
    shown = [f"{name} (id {key})" for key, name in categories[:_LONGEST_LIST]]
    more = len(categories) - len(shown)
    return ", ".join(shown + ([f"and {more} more"] if more else [])) or "none"


def check_annotations(
    report: SplitReport, content: CocoFile, unlabeled: bool = False
) -> tuple[dict[int | str, Entry], list[Entry] | None]:
    """Fills `report` from the content of an annotation file, but for boxes.

    Args:
        unlabeled: whether the file may be that of a test set, without annotations.

    Returns:
        By their ids, the entries of `images` that can be used; and the annotations that belong to
        these and to known categories, None for a test set.
    """
    for correction, cases in content.corrected.items():
        report.add("warning", cases, correction.what, correction.how)
    images = _check_images(report, content.images)
    if not unlabeled or content.annotations:
        _check_categories(report, content.categories)
        return images, _check_annotations(report, content.annotations, images)
    if content.categories:
        _check_categories(report, content.categories)
    report.empty = len(images)
    report.add(
        "warning",
        [f"all {len(images)} images"],
        "no annotations, as in a test set",
        "detections are written, nothing is evaluated",
    )
    return images, None


def _check_images(report: SplitReport, entries: list[Entry]) -> dict[int | str, Entry]:
    report.images = len(entries)
    if not entries:
        report.add("error", ["'images' is []"], "empty list of images", "add the images")
    needed = ("id", "file_name", "height", "width")
    complete = _complete(report, "images", entries, needed)
    good_ids = [image for image in complete if is_id(image["id"])]
    report.add(
        "error",
        [f"{name_of(image)}, id {image['id']!r}" for image in complete if not is_id(image["id"])],
        "images whose id is no whole number or text",
        _IDS,
    )
    mixed = _mixed(image["id"] for image in good_ids)
    if mixed:
        report.add("error", [mixed], "mix of numbers and text as image ids", _IDS)
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
        [
            f"{name_of(image)}, width {image['width']!r}, height {image['height']!r}"
            for image in named
            if not _is_length(image["width"], image["height"])
        ],
        "images whose width or height is not a positive number",
        "write their true size",
    )
    by_id = {image["id"]: image for image in sized}
    twice = repeated(repr(image["id"]) for image in sized)
    report.add("error", twice, "image ids that occur twice", "make the ids unique")
    names = repeated(image["file_name"] for image in sized)
    report.add("warning", names, "image files that are listed twice", "list each file once")
    return by_id


def _check_categories(report: SplitReport, entries: list[Entry]) -> None:
    if not entries:
        report.add("error", ["'categories' is []"], "empty list of categories", "add the classes")
    complete = _complete(report, "categories", entries, ("id", "name"))
    usable = [entry for entry in complete if is_id(entry["id"]) and _is_name(entry["name"])]
    bad = [
        f"id {entry['id']!r}, name {entry['name']!r}" for entry in complete if entry not in usable
    ]
    mixed = _mixed(entry["id"] for entry in usable)
    if mixed:
        bad, usable = [mixed], []
    report.add("error", bad, "categories with an unusable id or name", _IDS)
    report.categories = sorted((entry["id"], str(entry["name"])) for entry in usable)
    twice = repeated(repr(key) for key, _ in report.categories)
    report.add("error", twice, "category ids that occur twice", "make the ids unique")
    names = repeated(name for _, name in report.categories)
    ids = [key for key, name in report.categories if names and name == names[0]]
    report.add(
        "warning",
        names,
        "category names that occur twice",
        "each is a class of its own, told apart by its id as in "
        f"{f'{names[0]} (id {ids[0]})' if names else ''!r}; merge them if they mean the same",
    )


def _check_annotations(report: SplitReport, entries: list[Entry], images: Images) -> list[Entry]:
    complete = _complete(report, "annotations", entries, ("image_id", "category_id", "bbox"))
    _check_references(report, complete, images)
    ids = [repr(entry["id"]) if is_id(entry.get("id")) else "missing" for entry in complete]
    if "missing" in ids:
        ids.append("missing")  # one without an id is worth a warning, too
    report.add(
        "warning",
        repeated(ids),
        "annotation ids that occur twice or are missing",
        "numbered anew for the evaluation",
    )
    bad_crowds = [
        f"{name_of(entry)}, iscrowd {entry['iscrowd']!r}"
        for entry in complete
        if entry.get("iscrowd", 0) not in (0, 1)
    ]
    report.add("error", bad_crowds, "annotations whose iscrowd is not 0 or 1", "write 0 or 1")
    names = dict(report.categories)
    return [
        entry
        for entry in complete
        if _known(entry["image_id"], images) and _known(entry["category_id"], names)
    ]


def _check_references(report: SplitReport, entries: list[Entry], images: Images) -> None:
    # With a bad list of images, every annotation would be reported: the images come first.
    if len(images) == report.images:
        unknown = [entry for entry in entries if not _known(entry["image_id"], images)]
        report.add(
            "error",
            [f"{name_of(entry)}, image_id {entry['image_id']!r}" for entry in unknown],
            "annotations of an image_id that is not in 'images'",
            "add the images or remove the annotations"
            + _other_type((entry["image_id"] for entry in unknown), images),
        )
    names = dict(report.categories)
    unknown = [entry for entry in entries if not _known(entry["category_id"], names)]
    cause = _other_type((entry["category_id"] for entry in unknown), names)
    report.add(
        "error",
        [f"{name_of(entry)}, category_id {entry['category_id']!r}" for entry in unknown],
        "annotations of a category_id that is not in 'categories'",
        "add the categories or correct the ids"
        + (cause or " (are they shifted, from 0 against from 1?)"),
    )


def _other_type(values: Iterable[Any], known: Mapping[Any, Any]) -> str:
    """The cause, if ids are unknown only because they are text in one place and not in another."""
    texts = {str(key) for key in known}
    for value in values:
        plain = value.strip().removesuffix(".0") if isinstance(value, str) else value
        if is_id(plain) and str(plain) in texts:
            right = next(key for key in known if str(key) == str(plain))
            return f" ({value!r} is not {right!r}: write numbers in both lists, not text)"
    return ""


def _complete(
    report: SplitReport, key: str, entries: list[Entry], needed: tuple[str, ...]
) -> list[Entry]:
    lacking = [
        f"{name_of(entry)} has no {' and no '.join(name for name in needed if name not in entry)}"
        for entry in entries
        if not set(needed) <= entry.keys()
    ]
    report.add("error", lacking, f"entries of '{key}' that lack a key", "add it")
    return [entry for entry in entries if set(needed) <= entry.keys()]


def _names(entries: list[Entry], without: list[Entry]) -> list[str]:
    """Names of the entries that are not in `without`."""
    kept = {id(entry) for entry in without}
    return [name_of(entry) for entry in entries if id(entry) not in kept]


def _mixed(ids: Iterable[Any]) -> str:
    """One id of each type, if there are numbers and text."""
    first: dict[type, Any] = {}
    for key in ids:
        first.setdefault(type(key), key)
    return " and ".join(map(repr, first.values())) if len(first) > 1 else ""


def _known(key: Any, among: Mapping[Any, Any]) -> bool:
    return is_id(key) and key in among


def _is_name(value: Any) -> bool:
    return _is_utf8(value) or is_number(value)


def _is_utf8(text: Any) -> bool:
    if not isinstance(text, str):
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # "\udce9": how Python and json carry bytes that are not UTF-8
        return False
    return True


def _is_length(*values: Any) -> bool:
    return all(is_number(value) and value > 0 for value in values)


def name_of(entry: Entry) -> str:
    """What a report calls an entry of the file."""
    return str(entry.get("file_name") or entry.get("name") or f"id {entry.get('id')!r}")


def repeated(values: Iterable[Any]) -> list[str]:
    """Those that occur more than once."""
    return [str(value) for value, count in Counter(values).items() if count > 1]


@dataclass(frozen=True)
class _Extent:
    """The box (x0, y0, x1, y1) around the mask of an object."""

    entry: Entry
    corners: tuple[float, float, float, float]

    @property
    def case(self) -> str:
        numbers = ", ".join(f"{value:g}" for value in self.corners)
        return f"{name_of(self.entry)}, bbox {self.entry['bbox']!r}, mask in ({numbers})"


def check_masks(
    report: SplitReport,
    entries: list[Entry],
    images: Images,
    invalid_boxes: str,
    most: int | None = None,
) -> None:
    """Notes what is wrong with masks, and how many there are.

    Args:
        entries: annotations with a good box, crowds included.
        invalid_boxes: "error" or "skip", what `load_coco` does with masks that are damaged.
        most: of more entries, so many are looked at, always the same ones; None: all are.
    """
    if most is not None and len(entries) > most:
        entries = random.Random(0).sample(entries, most)
        report.sampled = most
    flaws: dict[MaskFlaw, list[str]] = {}
    extents: list[_Extent] = []
    without: list[Entry] = []
    for entry in entries:
        image = images[entry["image_id"]]
        checked = check_mask(entry.get("segmentation"), image["height"], image["width"])
        for flaw, says in checked.flaws:
            flaws.setdefault(flaw, []).append(f"{name_of(entry)}, {says}")
        if entry.get("iscrowd", 0) == 1:
            continue
        if checked.usable is None:
            without.append(entry)
        else:
            extents.append(_Extent(entry, extent_of(checked.usable)))
    report.masks = len(extents)
    if _note_parts(report, extents, images):
        return  # what follows would be said of most of the masks
    for flaw, cases in flaws.items():
        _note_flaw(report, flaw, cases, invalid_boxes)
    crowds = [
        name_of(entry)
        for entry in entries
        if entry.get("iscrowd", 0) == 1 and isinstance(entry.get("segmentation"), list)
        if entry["segmentation"]
    ]
    report.add(
        "warning",
        crowds,
        "crowd regions (iscrowd 1) whose mask is a polygon",
        "taken as crowds, which are not learned: write iscrowd 0 for single objects",
    )
    _compare_with_boxes(report, extents)
    _note_missing(report, without, images)


def _note_parts(report: SplitReport, extents: Sequence[_Extent], images: Images) -> bool:
    """All masks are from 0 to 1: an error; returns whether it is so."""
    in_parts = [
        max(map(abs, extent.corners)) <= _LARGEST_PART
        and min(images[extent.entry["image_id"]][side] for side in ("width", "height")) > 4
        for extent in extents
    ]
    if not in_parts or not all(in_parts):
        return False
    report.add(
        "error",
        [extent.case for extent in extents],
        "masks that are normalized (from 0 to 1) instead of in pixels",
        "multiply x by the width of the image, and y by its height",
    )
    return True


def _note_flaw(report: SplitReport, flaw: MaskFlaw, cases: list[str], invalid_boxes: str) -> None:
    if flaw.read_as:
        report.add("warning", cases, flaw.what, flaw.read_as)
    elif flaw.stops:
        report.add("error", cases, flaw.what, flaw.remedy)
    elif invalid_boxes == "skip":
        report.add("warning", cases, flaw.what, f"left out ({flaw.remedy})")
    else:
        remedy = f"{flaw.remedy}, or set data.invalid_boxes=skip to leave them out"
        report.add("error", cases, flaw.what, remedy)


def _compare_with_boxes(report: SplitReport, extents: Sequence[_Extent]) -> None:
    astray = [extent for extent in extents if _overlap(extent) < _FEWEST_SHARED]
    if len(extents) >= _FEWEST and len(astray) > 0.5 * len(extents):
        report.add(
            report.suspicion,
            [extent.case for extent in astray],
            f"masks that do not fit the boxes of their objects ({len(astray) / len(extents):.0%} "
            "of all)",
            "are x and y exchanged, or are they of another size of the images? write them in "
            "pixels of these images; if they are right, set data.preflight.suspicion=warning",
        )
        return
    report.add(
        "warning",
        [extent.case for extent in astray],
        "masks that do not fit the boxes of their objects",
        "boxes are learned as boxes, masks as masks: look at them",
    )


def _overlap(extent: _Extent) -> float:
    """IoU of the box around a mask with the box of its object; 1 if they differ by rounding."""
    x, y, width, height = extent.entry["bbox"]
    left, top, right, bottom = extent.corners
    sides = zip((x, y, x + width, y + height), extent.corners, strict=True)
    if max(abs(one - other) for one, other in sides) <= 2 * ROUNDING_PIXELS:
        return 1.0
    across = min(x + width, right) - max(x, left)
    down = min(y + height, bottom) - max(y, top)
    if across <= 0 or down <= 0:
        return 0.0
    shared = across * down
    return shared / (width * height + (right - left) * (bottom - top) - shared)


def _note_missing(report: SplitReport, without: list[Entry], images: Images) -> None:
    names = {entry["image_id"]: images[entry["image_id"]]["file_name"] for entry in without}
    cases = [f"{name_of(entry)} in {names[entry['image_id']]}" for entry in without]
    if report.split != "train":
        effect = "masks are only evaluated where all objects have one; boxes are in any case"
    elif report.masks:
        effect = f"the masks of these {len(names)} images are not trained, their boxes are"
    else:
        effect = "none has one: what learns masks is not trained, and nothing is pasted"
    report.add("warning", cases, "objects without a mask", effect)
