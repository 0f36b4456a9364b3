"""Preflight of masks: one by one, against the boxes of their objects, and over the whole file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from co_detr.data.coco import ROUNDING_PIXELS
from co_detr.data.coco_file import Entry
from co_detr.data.masks import MaskFlaw, check_mask, extent_of
from co_detr.data.preflight_annotations import Images, SplitReport, name_of

# Numbers that all are at most this are in no pixels, as in the preflight of boxes.
_LARGEST_PART = 1.1
# A mask whose own box has less in common with that of the object (IoU) is not of this object.
_FEWEST_SHARED = 0.5
# Few masks may be wrong one by one, and say nothing about the file.
_FEWEST = 10


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
    report: SplitReport, entries: list[Entry], images: Images, invalid_boxes: str
) -> None:
    """Notes what is wrong with masks, and how many there are.

    Args:
        entries: annotations with a good box, crowds included.
        invalid_boxes: "error" or "skip", what `load_coco` does with masks that are damaged.
    """
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
