r"""Checks a data set and draws the first training samples as the model gets them.

    co-detr inspect --config-file configs/co_detr_r50.py \
        data.train=my/train.json data.train_images=my/train \
        data.val=my/val.json data.val_images=my/val

The report is the one that training prints; the picture shows samples after augmentation, in the
order of the run's seed. Nothing is trained, and no checkpoint is read.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from co_detr.tools.draw.boxes import Sample


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--count", type=int, default=9, help="samples to draw (default: 9)")
    parser.add_argument("--output", type=Path, default=Path("output/data_samples.png"))
    parser.add_argument("opts", nargs="*", metavar="KEY=VALUE", help="override of a config key")
    return parser.parse_intermixed_args(argv)


def first_samples(args: argparse.Namespace) -> tuple[list[Sample], list[str]]:
    """Checks the data; returns the samples and the class names."""
    from detectron2.config import instantiate

    from co_detr.data.coco_classes import class_names
    from co_detr.engine.config import load_config
    from co_detr.engine.data_check import adopt_class_count, check_data
    from co_detr.tools.draw.boxes import sample_of

    cfg = load_config(args.config_file, args.opts)
    adopt_class_count(cfg, args.opts)
    check_data(cfg)
    cfg.dataloader.train.num_workers = 0  # workers would load more than is drawn
    loader = instantiate(cfg.dataloader.train)
    names = class_names(cfg.data.train)
    mapped = itertools.islice(itertools.chain.from_iterable(loader), max(1, args.count))
    return [sample_of(entry, names, cfg.data.image_format) for entry in mapped], names


def run(args: argparse.Namespace) -> None:
    """Checks the data and draws samples of it."""
    from co_detr.tools.draw.boxes import plot_samples

    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("co_detr").setLevel(logging.INFO)
    samples, names = first_samples(args)
    plot_samples(samples, names, args.output)
    print(f"{len(samples)} training samples are drawn in {args.output}")
