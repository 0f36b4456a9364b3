"""The command line of tools/convert_dataset.py."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from co_detr import program
from co_detr.errors import ConfigError, DataError

if TYPE_CHECKING:
    from co_detr.tools.convert.dataset import ConvertedSplit, Layout

_CONFIG = "co_detr_r50"
# Text that an override can hold without quotes, and that cannot be a number or a truth value.
_PLAIN = re.compile(r"[\w./-]*/[\w./-]*", re.ASCII)

EPILOG = """
examples:
  YOLO             python tools/convert_dataset.py my_yolo --output my_coco
  its yaml file    python tools/convert_dataset.py my_yolo/data.yaml --output my_coco
  VOC              python tools/convert_dataset.py VOCdevkit/VOC2012 --output my_coco
  without val set  python tools/convert_dataset.py my_yolo --output my_coco --val-fraction 0.2

Images stay where they are. The last lines printed are the command that trains on the result.
Exit status: 0, or 2 after an error that is explained in one sentence.
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of tools/convert_dataset.py."""
    parser = argparse.ArgumentParser(
        description="Makes COCO-format files from a YOLO or VOC folder.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder, or the yaml file of a YOLO data set")
    add("--output", type=Path, required=True, metavar="DIR", help="where train.json and so on go")
    add("--format", choices=("yolo", "voc"), help="default: by what the folder holds")
    add("--classes", type=Path, metavar="FILE", help="class names in their order, one per line")
    add("--val-fraction", type=float, metavar="PART", help="part of train that becomes val")
    add("--zero-based", action="store_true", help="VOC: coordinates are edges counted from 0")
    add("--keep-difficult", action="store_true", help="VOC: difficult objects are like others")
    add("--force", action="store_true", help="replace files that are there")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Converts, writes, reports, and prints how to train on the result.

    Raises:
        UserError: if an argument or the data set is wrong.
    """
    from co_detr.data.preflight import SplitFiles, preflight
    from co_detr.data.preflight_annotations import printable
    from co_detr.tools.convert.dataset import convert, save, share_out

    layout = _find(options)
    for note in layout.notes:
        print(printable(f"note: {note}"))
    splits = share_out(layout.splits, options.val_fraction, options.source)
    files = {split: options.output / f"{split}.json" for split in splits}
    there = [str(path) for path in files.values() if path.exists()]
    if there and not options.force:
        raise ConfigError(f"{there[0]} exists: choose another --output, or add --force.")
    converted = convert(splits, layout)
    for split in converted:
        save(split, files[split.name])
        _report(split, files[split.name])
    if layout.orphans:
        print(f"note: label files without an image: {_counted(layout.orphans)}; left out")
    sets = {split.name: split for split in converted}
    report = preflight(
        [
            SplitFiles(name, str(files[name]), str(sets[name].image_root), sets[name].has_masks)
            for name in ("train", "val")
        ]
    )
    print(f"Preflight of the result:\n{report.text()}")
    report.raise_on_errors()
    print(f"Train on it with:\n{training_command(sets, options.output)}")


def training_command(sets: dict[str, ConvertedSplit], output: Path) -> str:
    """The command that trains on ``train.json`` and ``val.json`` in `output`, for a shell."""
    lines = [f"{shlex.join(program('train'))} --config-file {_CONFIG}"]
    for name in ("train", "val"):
        values = (output / f"{name}.json", sets[name].image_root)
        keys = (f"data.{name}", f"data.{name}_images")
        lines.append(" ".join(map(_override, keys, map(str, values))))
    return " \\\n    ".join(lines)


def _override(key: str, value: str) -> str:
    if not _PLAIN.fullmatch(value):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        value = f'"{escaped}"'
    return shlex.quote(f"{key}={value}")


def _find(options: argparse.Namespace) -> Layout:
    from co_detr.tools.convert.dataset import read_class_names
    from co_detr.tools.convert.voc import VocRules, find_voc
    from co_detr.tools.convert.yolo import find_yolo

    source = options.source
    if not source.exists():
        raise DataError(f"{source} does not exist: correct the path.")
    names = read_class_names(options.classes) if options.classes else None
    rules = VocRules(options.zero_based, options.keep_difficult)
    # What --val-fraction draws need not be where a file says it is.
    optional = ("test",) if options.val_fraction is None else ("test", "val")
    kind = options.format or ("voc" if _has_xml(source) else "yolo")
    if kind == "yolo":
        if rules != VocRules():
            raise ConfigError("--zero-based and --keep-difficult are about VOC: leave them out.")
        return find_yolo(source, names, optional)
    if not source.is_dir():
        raise ConfigError(f"{source} is no folder: name the folder that holds Annotations.")
    return find_voc(source, rules, names, optional)


def _has_xml(source: Path) -> bool:
    """Whether a folder holds VOC's Annotations, or xml files, itself or in one of its folders."""
    if not source.is_dir():
        return False
    patterns = ("*.xml", "*/*.xml")
    return (source / "Annotations").is_dir() or any(
        any(source.glob(pattern)) for pattern in patterns
    )


def _report(split: ConvertedSplit, path: Path) -> None:
    from co_detr.data.preflight_annotations import Finding, printable

    content = split.content
    crowd = sum(annotation["iscrowd"] for annotation in content["annotations"])
    counts = f"{len(content['images'])} images, {len(content['annotations']) - crowd} boxes"
    print(printable(f"{split.name}: {counts}, {crowd} crowd regions, written to {path}"))
    for remark, cases in split.remarks.items():
        finding = Finding("warning", split.name, len(cases), remark.what, cases[0], remark.remedy)
        print(printable(f"note: {finding.sentence()}"))


def _counted(paths: list[Path]) -> str:
    from co_detr.data.preflight_annotations import printable

    return printable(f"{len(paths)} (the first: {paths[0]})")
