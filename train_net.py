#!/usr/bin/env python3
"""Trains or evaluates an experiment of configs/; `--help` shows examples.

The run itself is in `co_detr.engine.train`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

# OpenMP threads that wait for work spin for long by default. Where a data worker or another
# program shares the cores, that makes a step several times slower; must be set before torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from co_detr.errors import add_debug_argument
from co_detr.process_setup import silence_dependencies

silence_dependencies()

EPILOG = """
examples:
  train            python train_net.py --config-file configs/co_detr_r50.py --num-gpus 8
  own data         python train_net.py --config-file configs/co_detr_r50.py data.train=a.json \\
                       data.train_images=images data.val=b.json data.val_images=images
  continue         python train_net.py --config-file configs/co_detr_r50.py --resume
  evaluate         python train_net.py --config-file configs/co_detr_r50.py --eval-only \\
                       train.init_checkpoint=model_final.pth
  two processes    torchrun --nproc-per-node 2 train_net.py --config-file configs/quickstart.py \\
                       train.device=cpu
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Detectron2's arguments and `--debug`; flags may stand before, between or behind overrides."""
    parser = argparse.ArgumentParser(
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="experiment, such as configs/NAME.py")
    add("--resume", action="store_true", help="continue from train.output_dir's last checkpoint")
    add("--eval-only", action="store_true", help="evaluate only")
    add("--dry-run", action="store_true", help="measure memory and time of a step; writes nothing")
    add("--num-gpus", type=int, default=1, help="processes per machine (CPU ones without GPUs)")
    add("--num-machines", type=int, default=1, help="number of machines")
    add("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    add("--dist-url", default="auto", help="tcp://ADDRESS_OF_MACHINE_0:PORT; auto: a free port")
    add_debug_argument(parser)
    add("opts", nargs="*", metavar="KEY=VALUE", help="override of a config key")
    return parser.parse_intermixed_args(argv)


def command_line() -> int:
    arguments = parse_arguments()
    from co_detr.engine.train import run  # takes seconds, which --help does not need

    return run(arguments)


if __name__ == "__main__":
    sys.exit(command_line())
