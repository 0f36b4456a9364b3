"""Arguments of a training or an evaluation."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from co_detr.errors import add_debug_argument

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
    add(
        "--amp",
        choices=["bfloat16", "float16"],
        help="of --eval-only: mixed precision, as in predict.py (default: float32); that of "
        "trainings is train.amp",
    )
    add("--dry-run", action="store_true", help="measure memory and time of a step; writes nothing")
    add("--num-gpus", type=int, default=1, help="processes per machine (CPU ones without GPUs)")
    add("--num-machines", type=int, default=1, help="number of machines")
    add("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    add("--dist-url", default="auto", help="tcp://ADDRESS_OF_MACHINE_0:PORT; auto: a free port")
    add_debug_argument(parser)
    add("opts", nargs="*", metavar="KEY=VALUE", help="override of a config key")
    return parser.parse_intermixed_args(argv)


def run(options: argparse.Namespace) -> int:
    """Trains or evaluates; returns the exit code (see `co_detr.engine.train.run`)."""
    from co_detr.engine.train import run  # takes seconds, which --help does not need

    return run(options)
