"""The command line of tools/combine.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from co_detr.data.coco_file import CocoFile, Entry, read_coco, read_json, shortened
from co_detr.errors import ConfigError, DataError
from co_detr.tools.combine import BLENDING, RULES
from co_detr.tools.results import (
    DetectionFile,
    ImageId,
    Reference,
    read_detections,
    require_other_file,
)
from co_detr.tools.split_dataset import divide, group_images, write_json

if TYPE_CHECKING:
    from co_detr.tools.combine.choosing import Judge
    from co_detr.tools.combine.fusing import Settings

EPILOG = """
examples:
  two models, no labels    python tools/combine.py a.json b.json --output both.json
  with labels              python tools/combine.py a.json b.json --output both.json \\
                               --annotations val.json --leave-one-out
  settings are searched    ... --annotations val.json --sweep --tune-on half
  thresholds for F1        ... --annotations val.json --find-thresholds thresholds.json
  ... and used             ... --thresholds thresholds.json
  folds are joined         python tools/combine.py fold1.json fold2.json --folds \\
                               --annotations all.json --output out_of_fold.json

Exit status: 0, or 2 after an error that is explained in one sentence.
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of tools/combine.py."""
    parser = argparse.ArgumentParser(
        description="Combines detections of several models, or of folds, in one file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="coco_instances_results.json, predictions.json")
    add("--output", type=Path, required=True, metavar="FILE", help="in COCO's result format")
    add("--annotations", metavar="FILE", help="COCO json of the images, to judge and to choose by")
    add("--folds", action="store_true", help="no two files have an image in common: join them")
    add("--rule", choices=RULES, default="soft-nms", help="of fusing (default: soft-nms)")
    add("--iou", type=float, default=0.55, help="overlap that the rule goes by (default: 0.55)")
    add("--weights", nargs="+", type=float, metavar="W", help="trust in each file (default: 1)")
    add("--temperatures", nargs="+", metavar="T", help="of each file's scores; or: fit")
    add("--min-score", type=float, default=0.0, metavar="S", help="leave out what is below, first")
    add("--per-image", type=int, metavar="N", help="best detections of an image to keep")
    add("--allow-missing-images", action="store_true", help="a file without an image found nothing")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--thresholds", metavar="FILE", help="lowest score of each class, applied")
    chosen.add_argument("--find-thresholds", type=Path, metavar="FILE", help="best F1; written")
    add("--leave-one-out", action="store_true", help="AP without each of the files")
    add("--sweep", action="store_true", help="choose rule, IoU and weights by AP")
    add("--tune-on", metavar="half|FILE", help="images that choices are made on: half, or a json")
    add("--max-detections", type=int, default=100, help="of AP (default: COCO's 100)")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Reads, chooses, combines, writes and reports.

    Raises:
        UserError: if an argument or a file is wrong.
    """
    from co_detr.engine.evaluators import best_of_each_image
    from co_detr.tools.combine.choosing import (
        Judge,
        above,
        find_thresholds,
        fit_temperatures,
        read_thresholds,
        sweep,
    )
    from co_detr.tools.combine.fusing import combined

    _check_options(options)
    require_other_file(options.output, options.files)
    truth = None if options.annotations is None else read_coco(options.annotations)
    reference = None if truth is None else Reference.of(truth)
    sources, reference = read_detections(options.files, reference)
    sources = [
        replace(s, entries=[e for e in s.entries if e["score"] >= options.min_score])
        for s in sources
    ]
    if options.folds:
        sources = [_joined(sources, reference)]
    elif not options.allow_missing_images:
        _require_same_images(sources)
    settings = _settings(options, len(sources))
    if settings.rule in BLENDING or options.sweep:
        _require_no_masks(sources, options)
    judge = None
    if truth is not None and reference is not None:
        judge = Judge(truth, reference, _tune_images(options, truth), options.max_detections)
        if not judge.is_labeled and (_choices(options) or options.leave_one_out):
            raise DataError(f"{truth.path} has no annotations to choose or to judge by.")
    if options.temperatures == ["fit"]:
        settings = replace(settings, temperatures=fit_temperatures(sources, judge))
        shown = ", ".join(f"{value:.2f}" for value in settings.temperatures)
        print(f"Temperatures: {shown}")
    if options.sweep:
        settings = sweep(sources, settings, judge)
    merged = combined(sources, settings)
    if options.find_thresholds is not None:
        thresholds = find_thresholds(merged, judge)
        write_json(thresholds, options.find_thresholds)
        print(f"Wrote {options.find_thresholds}; --thresholds applies it.")
    elif options.thresholds is not None:
        merged = above(merged, read_thresholds(options.thresholds, reference), reference)
    if options.per_image is not None:
        merged = best_of_each_image(merged, options.per_image)
    write_json(merged, options.output)
    print(f"{len(merged)} detections in {options.output} ({settings.text(len(sources))})")
    if judge is not None and judge.is_labeled:
        _report(sources, settings, merged, judge, options)


def _choices(options: argparse.Namespace) -> list[str]:
    """Flags by which settings are chosen by ground truth."""
    flags = {
        "--sweep": options.sweep,
        "--temperatures fit": options.temperatures == ["fit"],
        "--find-thresholds": options.find_thresholds is not None,
    }
    return [flag for flag, on in flags.items() if on]


def _check_options(options: argparse.Namespace) -> None:
    needing = {
        "--leave-one-out": options.leave_one_out,
        "--folds": options.folds,
        "--tune-on": options.tune_on is not None,
    }
    asked = [*_choices(options), *(flag for flag, on in needing.items() if on)]
    if asked and options.annotations is None:
        raise ConfigError(f"{asked[0]} needs ground truth: add --annotations FILE.")
    if options.tune_on is not None and not _choices(options):
        raise ConfigError(
            "--tune-on is for --sweep, --temperatures fit and --find-thresholds: add one, or leave "
            "it out."
        )
    if options.folds and (options.sweep or options.leave_one_out or options.weights):
        raise ConfigError("--folds joins files, it fuses nothing: leave rules and weights out.")
    if (options.sweep or options.leave_one_out) and len(options.files) < 2:
        raise ConfigError("--sweep and --leave-one-out need at least two files: add another.")
    if options.per_image is not None and options.per_image < 1:
        raise ConfigError(f"--per-image {options.per_image} must be at least 1.")


def _settings(options: argparse.Namespace, number: int) -> Settings:
    from co_detr.tools.combine.fusing import Settings

    weights = options.weights or [1.0] * number
    temperatures = options.temperatures or ["1"]
    if temperatures in (["fit"], ["1"]):
        temperatures = ["1"] * number
    try:
        values = [float(text) for text in temperatures]
    except ValueError:
        raise ConfigError(
            f"--temperatures {' '.join(temperatures)}: give a number for each file, or fit."
        ) from None
    for flag, given in (("--weights", weights), ("--temperatures", values)):
        if len(given) != number:
            raise ConfigError(f"{flag} has {len(given)} numbers for {number} files: one for each.")
    return Settings(options.rule, options.iou, tuple(weights), tuple(values))


def _require_same_images(sources: Sequence[DetectionFile]) -> None:
    first = sources[0]
    for other in sources[1:]:
        for one, two in ((first, other), (other, first)):
            missing = one.images - two.images
            if missing:
                raise DataError(
                    f"{two.path} has no detection in {len(missing)} images of {one.path} (the "
                    f"first: image_id {min(missing, key=str)!r}): predict the same images, or add "
                    "--allow-missing-images if it has found nothing there."
                )


def _require_no_masks(sources: Sequence[DetectionFile], options: argparse.Namespace) -> None:
    masked = next((s.path for s in sources for e in s.entries if "segmentation" in e), None)
    if masked is not None and len(sources) > 1:
        how = "--sweep tries rules that average" if options.sweep else f"{options.rule} averages"
        raise ConfigError(
            f"{masked} has masks, and {how} boxes, which masks cannot follow: take --rule nms or "
            "soft-nms, without --sweep."
        )


def _joined(sources: Sequence[DetectionFile], reference: Reference | None) -> DetectionFile:
    """Files of folds as one.

    Raises:
        DataError: if an image is in two of them.
    """
    seen: dict[ImageId, str] = {}
    for source in sources:
        for image in source.images:
            if image in seen:
                raise DataError(
                    f"image_id {image!r} is in {seen[image]} and in {source.path}: folds have no "
                    "image in common; leave --folds out to fuse models of the same images."
                )
            seen[image] = source.path
    absent = 0 if reference is None else len(reference.images.keys() - seen.keys())
    if absent and reference is not None:
        print(f"note: no file has a detection in {absent} images of {reference.path}")
    entries = [entry for source in sources for entry in source.entries]
    return DetectionFile(f"{len(sources)} folds", entries, frozenset(seen))


def _tune_images(options: argparse.Namespace, truth: CocoFile) -> frozenset[ImageId] | None:
    """Images that settings are chosen on; None: all."""
    if options.tune_on is None:
        return None
    if options.tune_on == "half":
        return frozenset(divide(truth, group_images(truth), [0.5, 0.5])[0])
    content = read_json(options.tune_on)
    entries = content.get("images") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{options.tune_on} is no list of image ids: write [1, 2, ..].")
    ids = frozenset(entry["id"] if isinstance(entry, dict) else entry for entry in entries)
    known = {image["id"] for image in truth.images}
    if not ids < known:
        unknown = sorted(map(repr, ids - known))
        what = f"unknown ids ({shortened(unknown)})" if unknown else "all images, none to report on"
        raise DataError(f"{options.tune_on} has {what} of {truth.path}: name a part of its images.")
    return ids


def _report(
    sources: Sequence[DetectionFile],
    settings: Settings,
    merged: Sequence[Entry],
    judge: Judge,
    options: argparse.Namespace,
) -> None:
    """AP of every file, of all together and without each, on the images that are reported on."""
    from co_detr.engine.evaluation import MASKS
    from co_detr.tools.combine.fusing import combined

    lists: dict[str, Sequence[Entry]] = {}
    if len(sources) > 1:
        lists |= {source.path: source.entries for source in sources}
    lists["combined" if len(sources) > 1 else sources[0].path] = merged
    if options.leave_one_out:
        for number, source in enumerate(sources):
            others = [*sources[:number], *sources[number + 1 :]]
            lists[f"without {source.path}"] = combined(
                others, settings.without(number), judge.report, fuse_one=True
            )
    metrics = {name: judge.metrics(entries, judge.report) for name, entries in lists.items()}
    columns = ["AP", "AP50", "AP75"]
    columns += [f"{MASKS}/AP"] * any(f"{MASKS}/AP" in own for own in metrics.values())
    rows = [
        (name, *(f"{own[key]:.2f}" if key in own else "" for key in columns))
        for name, own in metrics.items()
    ]
    print(f"On {len(judge.report)} images of {judge.reference.path}:")
    print(tabulate(rows, ("", *columns), tablefmt="github", disable_numparse=True))
    names = _choices(options)
    if not names:
        print("No setting was chosen here. If you chose them by these numbers, they flatter.")
    elif judge.is_honest:
        print(f"Chosen on {len(judge.tune)} other images: {', '.join(names)}.")
    else:
        print(
            f"CHOSEN ON THE IMAGES THAT ARE REPORTED ON: {', '.join(names)}. The numbers flatter; "
            "--tune-on half chooses on one half and reports on the other."
        )
