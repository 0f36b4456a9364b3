#!/usr/bin/env python
"""Plots a run: OUTPUT_DIR/training_curve.png and OUTPUT_DIR/predictions.png."""

import argparse
import sys
from pathlib import Path
from typing import Any

from co_detr.process_setup import silence_dependencies

silence_dependencies()

import yaml

from co_detr.data.images import ImageReader
from co_detr.tools.draw.boxes import load_images, plot_predictions
from co_detr.tools.draw.curves import plot_training_curves, read_log


class _PlainLoader(yaml.SafeLoader):
    """Reads saved configs, whose Python objects (tuples, dtypes) are of no interest here."""


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path, help="output folder of a run")
    parser.add_argument(
        "--compare", type=Path, nargs="+", default=[], help="other runs for the training curve"
    )
    parser.add_argument("--annotations", type=Path, help="default: data.val of the run's config")
    parser.add_argument("--images", type=Path, help="default: data.val_images of that config")
    parser.add_argument("--score", type=float, default=0.3, help="least score that is drawn")
    parser.add_argument("--count", type=int, default=12, help="number of images")
    return parser.parse_args(argv)


def read_data(output_dir: Path, paths_needed: bool) -> dict[str, Any]:
    """The `data` node of the config that the run saved; {} if it has none and none is needed."""
    path = output_dir / "config.yaml"
    remedy = "give --annotations and --images"
    try:
        data = dict(yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)["data"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        if not paths_needed:
            return {}
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; {remedy}.") from error
        raise ValueError(f"{path} has no readable `data` node; {remedy}.") from error
    missing = [key for key in ("val", "val_images") if not isinstance(data.get(key), str)]
    if missing and paths_needed:
        raise ValueError(f"{path} has no path under data.{missing[0]}; {remedy}.")
    return data


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    output_dir: Path = args.output_dir
    try:
        if not output_dir.is_dir():
            raise FileNotFoundError(f"{output_dir} is not a folder; give a run's output folder.")
        logs = [
            read_log(folder / "metrics.jsonl", folder.resolve().name)
            for folder in [output_dir, *args.compare]
        ]
        curve = output_dir / "training_curve.png"
        plot_training_curves(logs, curve)
        print(f"Wrote {curve}")

        annotations, images = args.annotations, args.images
        paths_needed = annotations is None or images is None
        data = read_data(output_dir, paths_needed)
        if paths_needed:
            annotations = annotations or Path(data["val"])
            images = images or Path(data["val_images"])
        grid = output_dir / "predictions.png"
        joined = load_images(
            annotations,
            images,
            output_dir / "coco_instances_results.json",
            score_threshold=args.score,
            count=args.count,
        )
        plot_predictions(joined, grid, ImageReader.of_data(data))
        print(f"Wrote {grid}")
    except (OSError, ValueError) as error:
        print(f"plot_results: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
