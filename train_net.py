#!/usr/bin/env python3
"""Trains or evaluates an experiment of configs/; `--help` shows examples."""

from __future__ import annotations

import argparse
import os
import sys

# OpenMP threads that wait for work spin for long by default. Where a data worker or another
# program shares the cores, that makes a step several times slower; must be set before torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from co_detr.engine.config import load_config
from co_detr.engine.launch import launch, parse_arguments, report
from co_detr.engine.run import run_evaluation_only, run_training
from co_detr.errors import UserError


def main(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Runs in every process."""
    default_setup(cfg, args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="co_detr")
    if args.eval_only:
        run_evaluation_only(cfg, args.resume)
    else:
        run_training(cfg, args.resume)


def command_line() -> int:
    args = parse_arguments()
    try:
        cfg = load_config(args.config_file, args.opts)
        return launch(main, cfg, args)
    except UserError as error:
        report(error, args.debug)
        return 2


if __name__ == "__main__":
    sys.exit(command_line())
