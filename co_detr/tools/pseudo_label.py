"""Makes a COCO-format file of detections, for training on images that nobody has annotated.

Detections of one or several models are thinned out by NMS, taken by their scores, and joined with
the user's own annotations, which win where both see something. A training reads the result as any
other file. Scores stay in it, and weigh the losses of a training that asks for it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pycocotools.mask as mask_utils
from tabulate import tabulate

from co_detr.data.coco_file import CocoFile, Entry, display_names, is_box, read_coco, shortened
from co_detr.errors import ConfigError, DataError
from co_detr.tools.results import (
    DetectionFile,
    ImageId,
    Reference,
    by_image,
    corners,
    read_detections,
    require_other_file,
)
from co_detr.tools.split_dataset import write_json

if TYPE_CHECKING:
    from co_detr.data.coco import BoxChecker

EPILOG = """
examples:
  after predict.py        python tools/pseudo_label.py drawn/predictions.json --output pseudo.json
  after an evaluation     python tools/pseudo_label.py output/test/coco_instances_results.json \\
                              --annotations unlabeled.json --output pseudo.json
  two models, own labels  python tools/pseudo_label.py a.json b.json --annotations unlabeled.json \\
                              --labels my/train.json --output more.json
  classes                 ... --classes car=vehicle truck=vehicle person

Exit status: 0, or 2 after an error that is explained in one sentence.
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of tools/pseudo_label.py."""
    parser = argparse.ArgumentParser(
        description="Makes annotations of detections.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="coco_instances_results.json, predictions.json")
    add("--output", type=Path, required=True, metavar="FILE", help="COCO-format json")
    add("--annotations", metavar="FILE", help="COCO json that has the images, and was evaluated")
    add("--labels", metavar="FILE", help="own annotations, which win; COCO json")
    add("--score", type=float, default=0.5, metavar="S", help="labels from here on (default: 0.5)")
    add("--thresholds", metavar="FILE", help="the same by class, as tools/combine.py writes it")
    add("--uncertain", type=float, metavar="S", help="from here to --score: crowd regions")
    add("--skip-uncertain", action="store_true", help="leave images with such regions out")
    add("--keep-empty", action="store_true", help="keep images without a label")
    add("--classes", nargs="+", metavar="NAME[=NEW]", help="classes to take, and their new names")
    add("--groups", nargs="+", metavar="A,B", help="classes of which one object has only one")
    add("--nms", type=float, default=0.7, metavar="IOU", help="of a class or group (default: 0.7)")
    add("--overlap", type=float, default=0.5, metavar="IOU", help="own labels win (default: 0.5)")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Rules:
    """What becomes of detections.

    Attributes:
        score: from which on a detection is a label.
        thresholds: the same for some classes, by their names in the detections.
        uncertain: from which on a detection that is no label is a crowd region; None: it is
            dropped.
        classes: names in the detections -> names of labels; others are dropped. None: all stay.
        groups: names of labels that compete with each other in the NMS.
        nms: IoU above which the better one of two detections of a class or group stays.
        overlap: IoU with an own annotation, or share inside an own crowd region, from which on a
            detection gives way to it, whatever the classes.

    Raises:
        ConfigError: if a number is not between 0 and 1.
    """

    score: float = 0.5
    thresholds: Mapping[str, float] = field(default_factory=dict)
    uncertain: float | None = None
    classes: Mapping[str, str] | None = None
    groups: tuple[frozenset[str], ...] = ()
    nms: float = 0.7
    overlap: float = 0.5

    def __post_init__(self) -> None:
        for name in ("score", "uncertain", "nms", "overlap"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"--{name} {value:g} must be above 0 and at most 1.")
        if self.uncertain is not None and self.uncertain >= self.score and not self.thresholds:
            raise ConfigError(
                f"--uncertain {self.uncertain:g} must be below --score {self.score:g}."
            )

    def group(self, name: str) -> str:
        """One name for all classes that compete with each other."""
        return next((min(group) for group in self.groups if name in group), name)


@dataclass(frozen=True)
class Candidate:
    """A detection on its way to a label: its class's new name, and the file that it is from."""

    entry: Entry
    name: str
    source: str
    is_label: bool


def run(options: argparse.Namespace) -> None:
    """Reads, makes the annotations, writes and reports.

    Raises:
        UserError: if an argument or a file is wrong.
    """
    inputs = [*options.files, options.annotations, options.labels]
    require_other_file(options.output, [path for path in inputs if path is not None])
    evaluated = options.annotations
    reference = None if evaluated is None else Reference.of(read_coco(evaluated))
    sources, reference = read_detections(options.files, reference)
    if reference is None:
        raise ConfigError(
            f"{options.files[0]} has no images, only their ids: add --annotations with the json "
            "that was evaluated."
        )
    if not reference.classes:
        raise DataError(
            f"{reference.path} has no categories, so that nothing says what the detections are: "
            "add those of the model, numbered from 1 in its order."
        )
    own = None if options.labels is None else read_coco(options.labels)
    rules = _rules(options, reference)
    labels = make_labels(sources, reference, rules, own)
    if options.skip_uncertain:
        labels = labels.without(labels.uncertain_images, "with uncertain objects")
    if not options.keep_empty:
        labels = labels.without(labels.empty_images, "without a label")
    write_json(labels.content, options.output)
    print(labels.table())
    for note in labels.notes:
        print(f"note: {note}")
    number = len(labels.content["annotations"])
    print(f"Wrote {len(labels.content['images'])} images, {number} annotations: {options.output}")


def _rules(options: argparse.Namespace, reference: Reference) -> Rules:
    known = list(reference.classes.values())
    classes = None
    if options.classes is not None:
        pairs = [text.partition("=") for text in options.classes]
        classes = {name: new or name for name, _, new in pairs}
        unknown = [name for name in classes if name not in known]
        if unknown:
            raise ConfigError(
                f"--classes names {shortened(unknown)}, which {reference.path} does not have "
                f"({shortened(known)}): correct it."
            )
    names = set(known if classes is None else classes.values())
    groups = tuple(frozenset(text.split(",")) for text in options.groups or ())
    for position, group in enumerate(groups):
        shared = [name for other in groups[:position] for name in group & other]
        if group - names or shared:
            wrong = sorted(group - names) or shared
            raise ConfigError(
                f"--groups names {shortened(wrong)}, which is no class of the labels, or twice "
                f"there; they have {shortened(sorted(names))}."
            )
    thresholds = {}
    if options.thresholds is not None:
        from co_detr.tools.combine.choosing import read_thresholds

        thresholds = read_thresholds(options.thresholds, reference)
    return Rules(
        options.score,
        thresholds,
        options.uncertain,
        classes,
        groups,
        options.nms,
        options.overlap,
    )


@dataclass(frozen=True)
class PseudoLabels:
    """The result.

    Attributes:
        content: a COCO-format file. Annotations that were detections have their ``score``, and
            their file as ``source``.
        uncertain_images, empty_images: ids of images, none of which the user's own file has, with
            a crowd region, and without a label.
        counts: by name of a class, what became of its detections.
        notes: what else there is to say.
    """

    content: dict[str, list[Entry]]
    uncertain_images: frozenset[ImageId]
    empty_images: frozenset[ImageId]
    counts: Mapping[str, Counter[str]]
    notes: tuple[str, ...] = ()

    def without(self, images: frozenset[ImageId], what: str) -> PseudoLabels:
        """Leaves images out, and notes how many."""
        kept = {
            **self.content,
            "images": [i for i in self.content["images"] if i["id"] not in images],
            "annotations": [a for a in self.content["annotations"] if a["image_id"] not in images],
        }
        notes = (*self.notes, f"{len(images)} images {what} are left out") if images else self.notes
        return PseudoLabels(
            kept, self.uncertain_images - images, self.empty_images - images, self.counts, notes
        )

    def table(self) -> str:
        """What became of the detections of each class."""
        header = ("class", *_FATES)
        rows = [(name, *(own[fate] for fate in _FATES)) for name, own in self.counts.items()]
        return tabulate(rows, header, tablefmt="github")


_LABEL, _UNCERTAIN, _LOW, _DOUBLE, _OWN = "labels", "uncertain", "too low", "NMS", "own label there"
_FATES = (_LABEL, _UNCERTAIN, _LOW, _DOUBLE, _OWN)


def make_labels(
    sources: Sequence[DetectionFile],
    reference: Reference,
    rules: Rules,
    own: CocoFile | None = None,
) -> PseudoLabels:
    """Annotations of the images of `reference`, and of those of the user's own file.

    Images of both files are known by their `file_name`. Those of the own file keep their ids.

    Raises:
        DataError: if classes of the detections are none of the user's, an image has no name or
            size, or an own annotation no box.
    """
    from co_detr.data.coco import BoxChecker

    _require_complete(reference, own)
    categories = _categories(reference, rules, own)
    ids = {name: key for key, name in display_names(categories).items()}
    images = _Images(reference, own)
    checker = BoxChecker(reference.path, "skip")
    counts = {name: Counter[str]() for name in ids}
    annotations = [] if own is None else list(own.annotations)
    own_of = by_image(annotations)
    found = {source.path: by_image(source.entries) for source in sources}
    made: list[Entry] = []
    uncertain: set[ImageId] = set()
    for key, image in reference.images.items():
        candidates = []
        for path, entries in found.items():
            for entry in entries.get(key, ()):
                candidate = _candidate(entry, path, image, reference, rules, checker, counts)
                if candidate is not None:
                    candidates.append(candidate)
        image_id = images.ids[key]
        for candidate in _best(candidates, rules, own_of.get(image_id, ()), counts):
            made.append(_annotation(candidate, image_id, ids[candidate.name]))
            if not candidate.is_label:
                uncertain.add(image_id)
    numbered = [entry | {"id": n} for n, entry in enumerate([*annotations, *made], start=1)]
    labeled = {entry["image_id"] for entry in made if not entry["iscrowd"]}
    notes = []
    if checker.skipped:
        notes.append(f"{len(checker.skipped)} boxes {checker.skipped[0].kind}: left out")
    if any(entry["iscrowd"] for entry in made):
        notes.append(
            "uncertain objects are crowd regions: a training learns nothing there, as from "
            "background; an evaluation does not count them"
        )
    return PseudoLabels(
        {"images": images.entries, "annotations": numbered, "categories": categories},
        frozenset(uncertain - images.own),
        frozenset(set(images.ids.values()) - images.own - labeled),
        counts,
        tuple(notes),
    )


def _require_complete(reference: Reference, own: CocoFile | None) -> None:
    for key, image in reference.images.items():
        missing = {"file_name", "width", "height"} - image.keys()
        if missing:
            raise DataError(
                f"image id {key!r} of {reference.path} has no {' and no '.join(sorted(missing))}: "
                "add it."
            )
    if own is None:
        return
    known = {image.get("id") for image in own.images}
    for annotation in own.annotations:
        if annotation.get("image_id") not in known:
            raise DataError(
                f"annotation {annotation.get('id')!r} of {own.path} has the image_id "
                f"{annotation.get('image_id')!r}, which none of its images has: correct it."
            )
        if not is_box(annotation.get("bbox")):
            raise DataError(
                f"annotation {annotation.get('id')!r} of {own.path} has the bbox "
                f"{annotation.get('bbox')!r}, which is not four numbers: correct it."
            )


def _categories(reference: Reference, rules: Rules, own: CocoFile | None) -> list[Entry]:
    named = reference.classes.values() if rules.classes is None else rules.classes.values()
    if own is not None:
        known = set(Reference.of(own).classes.values())
        unknown = [name for name in dict.fromkeys(named) if name not in known]
        if unknown:
            raise DataError(
                f"{own.path} does not have the classes {shortened(unknown)} of the detections (it "
                f"has {shortened(sorted(known))}): rename or choose them with --classes."
            )
        return own.categories
    if rules.classes is None:
        return [{"id": key, "name": name} for key, name in reference.classes.items()]
    return [{"id": n, "name": name} for n, name in enumerate(dict.fromkeys(named), start=1)]


class _Images:
    """Images of both files.

    Attributes:
        entries: of the result.
        ids: id in the reference -> id in the result.
        own: ids of the user's own file.
    """

    def __init__(self, reference: Reference, own: CocoFile | None) -> None:
        self.entries = [] if own is None else list(own.images)
        self.own = frozenset(image["id"] for image in self.entries)
        by_name = {image.get("file_name"): image["id"] for image in self.entries}
        is_text = any(isinstance(key, str) for key in self.own)
        fresh = (f"pseudo {n}" if is_text else n for n in count(1))
        taken: set[ImageId] = set(self.own)
        self.ids: dict[ImageId, ImageId] = {}
        for key, image in reference.images.items():
            name = image.get("file_name")
            if name in by_name:
                self.ids[key] = by_name[name]
                continue
            is_other_kind = bool(self.own) and isinstance(key, str) != is_text
            if key in taken or is_other_kind:
                self.ids[key] = next(
                    n for n in fresh if n not in taken and n not in reference.images
                )
            else:
                self.ids[key] = key
            taken.add(self.ids[key])
            self.entries.append(image | {"id": self.ids[key]})


def _candidate(
    entry: Entry,
    source: str,
    image: Entry,
    reference: Reference,
    rules: Rules,
    checker: BoxChecker,
    counts: Mapping[str, Counter[str]],
) -> Candidate | None:
    """The detection, if its class and score are of interest, with its box inside the image."""
    before = reference.classes[entry["category_id"]]
    name = before if rules.classes is None else rules.classes.get(before)
    if name is None:
        return None
    lowest = rules.thresholds.get(before, rules.score)
    is_label = entry["score"] >= lowest
    if not is_label and (rules.uncertain is None or entry["score"] < rules.uncertain):
        counts[name][_LOW] += 1
        return None
    box = checker.clip(entry, image)
    if box is None:
        return None
    return Candidate(entry | {"bbox": box}, name, source, is_label)


def _best(
    candidates: Sequence[Candidate],
    rules: Rules,
    own: Sequence[Entry],
    counts: Mapping[str, Counter[str]],
) -> list[Candidate]:
    """Those of one image that are left by NMS and by the user's own annotations."""
    import torch
    from torchvision.ops import batched_nms

    if not candidates:
        return []
    entries = [candidate.entry for candidate in candidates]
    groups = [rules.group(candidate.name) for candidate in candidates]
    numbers = {group: n for n, group in enumerate(dict.fromkeys(groups))}
    kept = batched_nms(
        torch.from_numpy(corners(entries)),
        torch.tensor([entry["score"] for entry in entries], dtype=torch.float64),
        torch.tensor([numbers[group] for group in groups]),
        rules.nms,
    ).tolist()
    for index in set(range(len(candidates))) - set(kept):
        counts[candidates[index].name][_DOUBLE] += 1
    chosen = [candidates[index] for index in kept]
    overlaps = np.zeros((len(chosen), 1))
    if own:
        overlaps = mask_utils.iou(
            np.array([candidate.entry["bbox"] for candidate in chosen], np.float64),
            np.array([annotation["bbox"] for annotation in own], np.float64),
            [int(annotation["iscrowd"]) for annotation in own],
        )
    best = []
    for candidate, taken in zip(chosen, overlaps.max(1) >= rules.overlap, strict=True):
        fate = _OWN if taken else _LABEL if candidate.is_label else _UNCERTAIN
        counts[candidate.name][fate] += 1
        if not taken:
            best.append(candidate)
    return best


def _annotation(candidate: Candidate, image_id: ImageId, category_id: int | str) -> Entry:
    entry = candidate.entry
    made = {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": entry["bbox"],
        "area": entry["bbox"][2] * entry["bbox"][3],
        "iscrowd": int(not candidate.is_label),
        "score": entry["score"],
        "source": candidate.source,
    }
    if "segmentation" in entry:
        made["segmentation"] = entry["segmentation"]
        made["area"] = float(mask_utils.area(entry["segmentation"]))
    return made
