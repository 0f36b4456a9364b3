"""Preflight of boxes: one by one, and what can only be seen over the whole file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from co_detr.data.coco import ROUNDING_PIXELS, BoxChecker, is_typed_box
from co_detr.data.coco_file import Entry, is_box
from co_detr.data.preflight_annotations import Images, SplitReport, name_of, repeated

# A box whose numbers all are at most this is in no pixels: it would be smaller than one.
_LARGEST_PART = 1.1
# A box with less of its area in the image than this is not meant for it.
_INSIDE = 0.9
# Few boxes may be wrong one by one, and say nothing about the file.
_FEWEST = 10
# Cells across an object: with fewer a detector misses most of them, with enough it does not.
_FEWEST_CELLS = 3
_ENOUGH_CELLS = 5
_SWITCH = "if they are right, set data.preflight.suspicion=warning"
_MANY_CROWDS = 0.05  # part of all boxes; COCO has 0.01
# Queries for each object of an image that is more crowded than most: with fewer many objects have
# none, with enough nearly all have one (docs/evidence.md, "Crowded images").
_FEWEST_QUERIES = 2
_ENOUGH_QUERIES = 3
_CROWDED = 0.05  # part of all images


@dataclass(frozen=True)
class Limit:
    """A setting that bounds how many objects can be found.

    Attributes:
        key: for an override.
        number: its value.
        is_trained: whether another value takes another training.
    """

    key: str
    number: int
    is_trained: bool = False


@dataclass(frozen=True)
class InputSize:
    """How large images are when the model sees them.

    Attributes:
        short_edge, max_size: pixels of the shorter side, and at most of the longer one.
        stride: pixels of a cell of the finest level of the encoder.
    """

    short_edge: int
    max_size: int
    stride: int

    def scale(self, width: int, height: int) -> float:
        """The factor of an image's sides."""
        return min(self.short_edge / min(width, height), self.max_size / max(width, height))


@dataclass(frozen=True)
class Limits:
    """What the objects of an image are compared with; None: not known.

    Attributes:
        queries: of the model, per image.
        detections: that the model gives, per image.
        evaluated: detections that the evaluation looks at, per image and class.
        input_size: of the evaluation, which the sizes of objects are told in.
    """

    queries: Limit | None = None
    detections: Limit | None = None
    evaluated: Limit | None = None
    input_size: InputSize | None = None


def check_boxes(
    report: SplitReport, entries: list[Entry], images: Images, invalid_boxes: str
) -> list[Entry]:
    """Returns the annotations whose box has an area inside its image.

    Args:
        entries: annotations of `images` that have a `bbox`.
        invalid_boxes: "error" or "skip", what `load_coco` does with boxes without area.
    """
    typed = [entry for entry in entries if is_typed_box(entry["bbox"])]
    report.add(
        "error",
        [_case(entry) for entry in entries if not is_typed_box(entry["bbox"])],
        "annotations whose bbox is no list of four numbers",
        "write x, y, w and h as numbers, without quotes",
    )
    if _judge_file(report, typed, images):
        return typed  # what follows would be said of most of the boxes
    boxes = BoxChecker(report.file, "skip")
    good = [entry for entry in typed if boxes.clip(entry, images[entry["image_id"]]) is not None]
    by_kind: dict[str, list[str]] = {}
    for skipped in boxes.skipped:
        by_kind.setdefault(skipped.kind, []).append(skipped.where)
    for kind, cases in by_kind.items():
        if invalid_boxes == "skip":
            report.add("warning", cases, f"boxes that {kind}", "left out")
        else:
            remedy = "correct or remove them, or set data.invalid_boxes=skip to leave them out"
            report.add("error", cases, f"boxes that {kind}", remedy)
    report.add("warning", boxes.clipped, "boxes that are partly outside their image", "clipped")
    places = repeated((entry["image_id"], entry["category_id"], *entry["bbox"]) for entry in good)
    report.add("warning", places, "boxes that occur twice (image, category, box)", "remove them")
    return good


def _from_size(box: np.ndarray) -> np.ndarray:
    return np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1)


def _from_center(box: np.ndarray) -> np.ndarray:
    return np.concatenate([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], axis=1)


@dataclass(frozen=True)
class _Notation:
    """A way to write a box as four numbers.

    Attributes:
        name: with the numbers.
        remedy: what makes (x, y, w, h) of it.
        corners: gives (x0, y0, x1, y1) for an array (N, 4).
        tolerance: part of a side of the image, but at least a pixel, that a box may reach out of it
            and still fit. Objects that fill their images, with labels that are a little too large,
            look like corners.
    """

    name: str
    remedy: str
    corners: Callable[[np.ndarray], np.ndarray]
    tolerance: float


_OTHER_NOTATIONS = (
    # Before corners: boxes that fit as both are centers. Corners taken as a center and a size leave
    # the image on the left or above, unless objects are small.
    _Notation(
        "centers (cx, cy, w, h)",
        "subtract half of w from cx and half of h from cy",
        _from_center,
        tolerance=0.002,
    ),
    _Notation(
        "corners (x0, y0, x1, y1)",
        "subtract x0 from x1 and y0 from y1",
        lambda box: box,
        tolerance=0.01,
    ),
    _Notation(
        "corners (y0, x0, y1, x1)",
        "write (x0, y0, x1 - x0, y1 - y0)",
        lambda box: box[:, [1, 0, 3, 2]],
        tolerance=0.01,
    ),
)


def _judge_file(report: SplitReport, entries: list[Entry], images: Images) -> bool:
    """Notes that all boxes are in another notation or unit; returns whether that is an error."""
    finite = [entry for entry in entries if is_box(entry["bbox"])]
    if not finite:
        return False
    boxes = np.array([entry["bbox"] for entry in finite], dtype=np.float64)  # (N, 4)
    sides = [
        (images[entry["image_id"]]["width"], images[entry["image_id"]]["height"])
        for entry in finite
    ]
    sizes = np.array(sides, dtype=np.float64)  # (N, 2): width, height
    small = (np.abs(boxes).max(axis=1) <= _LARGEST_PART) & (sizes.min(axis=1) > 4)
    if small.all():
        return _note_parts(report, finite, boxes)
    report.add(
        "warning",
        _cases(finite, small),
        "boxes smaller than a pixel, with numbers from 0 to 1 only",
        "taken as pixels: write them in pixels, or remove them",
    )
    return _note_notation(report, finite, boxes, sizes)


def _note_parts(report: SplitReport, entries: list[Entry], boxes: np.ndarray) -> bool:
    """All boxes are from 0 to 1: an error, whatever their notation."""
    other = _other_notation(boxes, np.ones((len(boxes), 2)))
    remedy = "multiply x and w by the width of the image, y and h by its height"
    kind = "normalized (from 0 to 1) instead of in pixels"
    if other is not None:
        kind += f", and {other.notation.name} instead of (x, y, w, h)"
        remedy = f"{other.notation.remedy}, and {remedy}"
    report.add("error", [_case(entry) for entry in entries], f"boxes that are {kind}", remedy)
    return True


def _note_notation(
    report: SplitReport, entries: list[Entry], boxes: np.ndarray, sizes: np.ndarray
) -> bool:
    other = _other_notation(boxes, sizes)
    if other is not None and other.leaving.sum() >= 2:
        # Of centers only boxes at the right and lower edge leave their image.
        is_error = other.leaving.mean() >= (0.1 if len(entries) >= _FEWEST else 0.5)
        in_file = "in the whole file" if is_error else "if all boxes of the file are these"
        report.add(
            report.suspicion if is_error else "warning",
            _cases(entries, other.leaving),
            f"boxes that leave their image as (x, y, w, h), but fit as {other.notation.name}",
            f"{other.notation.remedy} {in_file}; {_SWITCH}"
            if is_error
            else f"{other.notation.remedy} {in_file}",
        )
        return is_error and report.suspicion == "error"
    corners = _from_size(boxes)
    area = (corners[:, 2:] - corners[:, :2]).clip(min=0).prod(axis=1)
    inside = np.minimum(corners[:, 2:], sizes) - corners[:, :2].clip(min=0)
    astray = (area > 0) & (inside.clip(min=0).prod(axis=1) < _INSIDE * area)
    if astray.sum() > max(2, 0.5 * len(entries)):
        report.add(
            report.suspicion,
            _cases(entries, astray),
            f"boxes that do not fit their image ({astray.mean():.0%} of all)",
            "are they of another size of the images, of other images, or not (x, y, w, h) in "
            f"pixels? write them for these images; {_SWITCH}",
        )
        return report.suspicion == "error"
    reach = (corners[:, 2:] / sizes).max(axis=0)
    if len(entries) >= _FEWEST and reach.max() < 0.5:
        report.add(
            "warning",
            [f"none of {len(entries)} reaches beyond {reach[0]:.0%} of the width, {reach[1]:.0%} "
             "of the height"],
            "boxes in one corner of their images only",
            "are they in percent, or of a smaller copy of the images?",
        )  # fmt: skip
    return False


@dataclass(frozen=True)
class _Suspicion:
    """Another notation, and which boxes, (N,) bool, do not fit without it."""

    notation: _Notation
    leaving: np.ndarray


def _other_notation(boxes: np.ndarray, sizes: np.ndarray) -> _Suspicion | None:
    """The notation that explains most of the boxes that leave their image as (x, y, w, h)."""
    best, most = None, 0
    for notation in _OTHER_NOTATIONS:
        leaving = ~_stays(_from_size(boxes), sizes, notation.tolerance)
        left = ~_stays(notation.corners(boxes), sizes, notation.tolerance)
        gain = int(leaving.sum()) - int(left.sum())
        if gain > most and left.sum() <= 0.1 * leaving.sum():
            best, most = _Suspicion(notation, leaving), gain
    return best


def _stays(corners: np.ndarray, sizes: np.ndarray, tolerance: float) -> np.ndarray:
    """(N,) bool: the box has an area, and does not leave its image; normalized with sizes of 1."""
    low, high = corners[:, :2], corners[:, 2:]
    margin = tolerance * sizes
    if (sizes > 1).all():
        margin = np.maximum(margin, ROUNDING_PIXELS)
    return ((high > low) & (low >= -margin) & (high <= sizes + margin)).all(axis=1)


def count_objects(report: SplitReport, good: list[Entry], images: Images, limits: Limits) -> None:
    """Counts boxes, crowds and empty images, and compares images with what can be found."""
    crowds = [entry for entry in good if entry.get("iscrowd", 0) == 1]
    objects = [entry for entry in good if entry.get("iscrowd", 0) != 1]
    report.crowd, report.boxes = len(crowds), len(objects)
    report.empty = len(images) - len({entry["image_id"] for entry in objects})
    _check_crowds(report, crowds, len(good))
    if not objects:
        if not crowds:
            none = [f"all {len(images)} images are empty"] if images else []
            remedy = "annotate objects, or give the right file"
            report.add("error", none, f"no box to {_purpose(report)}", remedy)
        return
    used = {entry["category_id"] for entry in objects}
    unused = [name for key, name in report.categories if key not in used]
    effect = "they cannot be learned" if report.split == "train" else "their AP is undefined"
    report.add("warning", unused, "classes without a box", effect)
    _compare_with_limits(report, objects, images, limits)
    if limits.input_size is not None:
        _tell_sizes(report, objects, images, limits.input_size)


def _check_crowds(report: SplitReport, crowds: list[Entry], number: int) -> None:
    masks = sum(isinstance(crowd.get("segmentation"), dict) for crowd in crowds)
    cause = "label tools mark masks in run-length form as crowd"
    if masks:
        cause = f"{masks} of them have masks in run-length form, which label tools mark as crowd"
    cases = [name_of(crowd) for crowd in crowds]
    if crowds and len(crowds) == number:
        report.add(
            "error",
            cases,
            f"no box to {_purpose(report)}, as all are marked as crowd (iscrowd 1)",
            f"{cause}: write iscrowd 0 for single objects",
        )
    elif len(crowds) > max(1, _MANY_CROWDS * number):
        report.add(
            "warning",
            cases,
            f"boxes marked as crowd (iscrowd 1), {len(crowds) / number:.0%} of all",
            f"neither learned nor counted as found or missed; {cause}: write iscrowd 0 for single "
            "objects",
        )


def _compare_with_limits(
    report: SplitReport, objects: list[Entry], images: Images, limits: Limits
) -> None:
    per_image = Counter(entry["image_id"] for entry in objects)
    per_class = Counter((entry["image_id"], entry["category_id"]) for entry in objects)
    of_one_class: dict[int | str, int] = {}
    for (image, _), count in per_class.items():
        of_one_class[image] = max(count, of_one_class.get(image, 0))
    rows = [
        (limits.detections, per_image, "than the model gives detections", "the others are lost")
    ]
    if report.split != "train":
        rows.append(
            (limits.evaluated, of_one_class, "of one class than the evaluation looks at", "AP "
             "stays below 100")
        )  # fmt: skip
    if limits.queries is not None and objects:
        _compare_with_queries(report, per_image, images, limits.queries)
    for limit, counts, than, effect in rows:
        if limit is None:
            continue
        over = {key: count for key, count in counts.items() if count > limit.number}
        fullest = sorted(over, key=over.__getitem__, reverse=True)
        most = -(-max(over.values(), default=0) // 100) * 100
        report.add(
            "warning",
            [f"{images[key]['file_name']} with {over[key]}" for key in fullest],
            f"images with more objects {than} ({limit.number})",
            f"{effect}: set {limit.key}={most}",
        )


def _compare_with_queries(
    report: SplitReport, per_image: dict[int | str, int], images: Images, queries: Limit
) -> None:
    """Fewer queries than objects are a limit, and few more than that a loss of AP."""
    crowd = {key: n for key, n in per_image.items() if n * _FEWEST_QUERIES > queries.number}
    over = {key: n for key, n in crowd.items() if n > queries.number}
    if not over and len(crowd) <= _CROWDED * len(images):
        return
    share = 100 * (1 - _CROWDED)
    usual = np.percentile([*per_image.values()], share, method="higher")
    enough = 50 * math.ceil(max(_ENOUGH_QUERIES * usual, *over.values(), 0) / 50)
    cases = over or crowd
    fullest = sorted(cases, key=cases.__getitem__, reverse=True)
    than, effect = "half of the model's queries", "many will not be found"
    if over:
        than, effect = "the model has queries", "the others cannot be found"
    report.add(
        "warning",
        [f"{images[key]['file_name']} with {cases[key]}" for key in fullest],
        f"images with more objects than {than} ({queries.number})",
        f"{effect}: {'train with' if queries.is_trained else 'set'} {queries.key}={enough}",
    )


def _tell_sizes(
    report: SplitReport, objects: list[Entry], images: Images, input_size: InputSize
) -> None:
    """Objects as the model sees them; too small ones give a low AP that nothing else explains."""
    sides = []
    for entry in objects:
        image, (_, _, w, h) = images[entry["image_id"]], entry["bbox"]
        # Clipped boxes would be a little smaller; the square root is that of COCO's sizes.
        sides.append(input_size.scale(image["width"], image["height"]) * math.sqrt(w * h))
    small, median, large = np.percentile(sides, [10, 50, 90])
    stride = input_size.stride
    report.sizes.append(
        f"at the network's input size (short edge {input_size.short_edge}, at most "
        f"{input_size.max_size}) half of the objects are smaller than {median:.0f} pixels "
        f"({median / stride:.1f} cells of the finest level), a tenth smaller than {small:.0f}, a "
        f"tenth larger than {large:.0f}"
    )
    if median >= _FEWEST_CELLS * stride:
        return
    factor = _ENOUGH_CELLS * stride / median
    # A multiple of 32 is what backbones divide by.
    short, long = (
        32 * math.ceil(factor * side / 32) for side in (input_size.short_edge, input_size.max_size)
    )
    key = "augmentations"
    report.add(
        "warning",
        [f"half of {len(objects)} objects are at most {median:.0f} pixels"],
        f"objects smaller than {_FEWEST_CELLS} cells of the finest level ({stride} pixels each)",
        f"they are hard to find: larger input with dataloader.test.mapper.{key}.short_edge={short} "
        f"dataloader.test.mapper.{key}.max_size={long} "
        f"'dataloader.train.mapper.{key}.short_edges=[{short}]' "
        f"dataloader.train.mapper.{key}.max_size={long} (about {factor**2:.0f} times the time and "
        "memory of a step), or cut the images into parts",
    )


def _cases(entries: list[Entry], chosen: np.ndarray) -> list[str]:
    return [_case(entry) for entry, is_chosen in zip(entries, chosen, strict=True) if is_chosen]


def _case(entry: Entry) -> str:
    return f"{name_of(entry)}, bbox {entry['bbox']!r}"


def _purpose(report: SplitReport) -> str:
    return "learn from" if report.split == "train" else "evaluate on"
