#!/usr/bin/env python3
"""Trains or evaluates an experiment of configs/; `--help` shows examples."""

from __future__ import annotations

import argparse
import os
import sys

# OpenMP threads that wait for work spin for long by default. Where a data worker or another
# program shares the cores, that makes a step several times slower; must be set before torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from co_detr.noise import silence_dependencies

silence_dependencies()

from detectron2.utils import comm
from omegaconf import DictConfig

from co_detr.engine.config import load_config
from co_detr.engine.dry_run import dry_run
from co_detr.engine.launch import launch, parse_arguments, report
from co_detr.engine.own_data import adopt_class_count, check_data
from co_detr.engine.run import run_evaluation_only, run_training
from co_detr.engine.run_folder import exclusive
from co_detr.engine.setup import setup_run
from co_detr.errors import UserError


def main(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Runs in every process."""
    log = setup_run(cfg)
    if args.dry_run:
        measured = dry_run(cfg)
        if comm.is_main_process():
            print(measured.text())
    elif args.eval_only:
        check_data(cfg, eval_only=True)
        run_evaluation_only(cfg, args.resume, log)
    else:
        with exclusive(cfg.train.output_dir):
            check_data(cfg)
            run_training(cfg, args.resume, log)


def command_line() -> int:
    args = parse_arguments()
    try:
        cfg = load_config(args.config_file, args.opts)
        adopt_class_count(cfg, args.opts, args.eval_only, args.resume)
        return launch(main, cfg, args)
    except UserError as error:
        report(error, args.debug)
        return 2


if __name__ == "__main__":
    sys.exit(command_line())
