#!/usr/bin/env python3
"""Time and peak memory of training steps and of inference, whole models, random weights.

    python -m benchmarks.train_step                        everything that is installed
    python -m benchmarks.train_step --quick                small images, to see that it works
    python -m benchmarks.train_step --mode train --contestants k0 k2
    python -m benchmarks.train_step --add "wide configs/co_detr_r50.py model.encoder.num_points=8"

Every contestant lives in a process of its own, so that peak memory is its own; the processes have
their turns one after the other in a new random order each round, so that times can be compared.
For the peer install transformers: pip install -r requirements-bench.txt (or name an interpreter
that has it: --peer-python).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import environment, write_json
from benchmarks.step.case import Case
from benchmarks.step.contestants import (
    BUILT_IN,
    DEFAULT,
    TRAINING_ONLY,
    Contestant,
    from_other_checkout,
    has_transformers,
    parse_added,
)
from benchmarks.step.processes import Worker, take_turns, wait_for
from benchmarks.step.tables import as_json, measurements_table, ratios_table
from benchmarks.step.worker import Setup

QUICK_SIZE = (192, 256)
SIZES = {  # by device: training, inference
    "cpu": ((640, 896), (800, 1216)),
    "cuda": ((800, 1333), (800, 1333)),
}
BATCH = {"cpu": 1, "cuda": 2}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    contestants = choose_contestants(options)
    pythons = {"co_detr": sys.executable, "transformers": options.peer_python}
    print(f"{environment()['cpu']}, {options.threads} threads, torch {torch.__version__}")
    for contestant in contestants:
        print(f"  {contestant.name}: {contestant.about}")
    results = []

    def start(case: Case) -> list[Worker]:
        return [
            Worker(Setup(contestant, case, allocator, options.threads), pythons[contestant.kind])
            for allocator in options.allocators
            for contestant in contestants
            if case.mode == "train" or contestant.name not in TRAINING_ONLY
        ]

    all_cases = cases(options)
    # A GPU's host has the memory for all of them, and starting takes longer than the steps.
    started = {case: start(case) for case in all_cases} if options.together else {}
    for case in all_cases:
        failures: dict[str, str] = {}
        workers = wait_for(started.get(case) or start(case), failures)
        records = take_turns(workers, options.rounds, options.warm_up, options.steps, failures)
        results.append(as_json(case, records, failures))
        print(f"\n## {case.title}\n")
        print(measurements_table(records, case), ratios_table(records), sep="\n\n", flush=True)
        for name, reason in failures.items():
            print(f"\n{name} failed: {reason}")
    if options.output:
        settings = {
            name: getattr(options, name) for name in ("threads", "rounds", "warm_up", "steps")
        }
        content = {"environment": environment(), "settings": settings, "results": results}
        write_json(options.output, content)
        print(f"\nWrote {options.output}")
    return 1 if any(result["failures"] for result in results) else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mode", choices=("train", "inference", "both"), default="both")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    add("--contestants", nargs="*", choices=BUILT_IN, default=DEFAULT, metavar="NAME")
    add(
        "--add",
        action="append",
        default=[],
        metavar='"NAME CONFIG [KEY=VALUE ...]"',
        help="one more contestant; may be repeated",
    )
    add("--against", type=Path, metavar="DIR", help="other built checkout to run as NAME@DIR, too")
    add("--peer-python", default=sys.executable, help="interpreter that has transformers")
    add(
        "--allocator",
        choices=("default", "tuned", "both"),
        help="glibc's settings for freed memory: its own, this project's, or a run of each "
        "(default: both, on CUDA its own)",
    )
    add(
        *("--precision", "--precisions"),
        nargs="+",
        choices=("fp32", "tf32", "bf16"),
        default=["fp32"],
        help="bf16: autocast",
    )
    add("--together", action="store_true", help="start the processes of all cases at once")
    add("--with-optimizer", action="store_true", help="a training step also clips and updates")
    add("--train-size", type=size, metavar="HxW", help="640x896; on CUDA 800x1333")
    add("--test-size", type=size, metavar="HxW", help="800x1216; on CUDA 800x1333")
    add("--batch", type=int, help="images; 1, on CUDA 2")
    add("--gts", type=int, default=8, help="ground truths per image (default: 8)")
    add("--rounds", type=int, default=5, help="turns of each contestant (default: 5)")
    add("--steps", type=int, default=2, help="timed steps in a turn (default: 2)")
    add("--warm-up", type=int, default=1, help="untimed steps before them (default: 1)")
    add("--quick", action="store_true", help="192x256, one round of one step")
    add("--output", type=Path, metavar="FILE", help="JSON with every step and the environment")
    options = parser.parse_args(arguments)
    if options.quick:
        options.train_size = options.train_size or QUICK_SIZE
        options.test_size = options.test_size or QUICK_SIZE
        options.rounds = options.steps = 1
    usual = "default" if options.device == "cuda" else "both"  # it is the host's memory
    allocator = options.allocator or usual
    options.allocators = ("default", "tuned") if allocator == "both" else (allocator,)
    try:
        options.added = [parse_added(text) for text in options.add]
    except ValueError as error:
        parser.error(str(error))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is here; use --device cpu")
    return options


def size(text: str) -> tuple[int, int]:
    height, width = map(int, text.split("x"))
    return height, width


def cases(options: argparse.Namespace) -> list[Case]:
    """The workloads that the options ask for."""
    sizes = dict(zip(("train", "inference"), SIZES[options.device], strict=True))
    sizes["train"] = options.train_size or sizes["train"]
    sizes["inference"] = options.test_size or sizes["inference"]
    return [
        Case(
            mode=mode,
            height=sizes[mode][0],
            width=sizes[mode][1],
            batch=options.batch or BATCH[options.device],
            num_gts=options.gts,
            device=options.device,
            precision=precision,
            with_optimizer=options.with_optimizer and mode == "train",
        )
        for precision in options.precision
        for mode in sizes
        if options.mode in (mode, "both")
    ]


def choose_contestants(options: argparse.Namespace) -> list[Contestant]:
    """Built-in ones, added ones, and those of the other checkout; peers only if installed."""
    chosen = [BUILT_IN[name] for name in options.contestants] + options.added
    peers = [contestant for contestant in chosen if contestant.kind == "transformers"]
    if peers and not has_transformers(options.peer_python):
        print(
            f"{options.peer_python} has no transformers: the peer is left out; "
            "pip install -r requirements-bench.txt, or use --peer-python."
        )
        chosen = [contestant for contestant in chosen if contestant not in peers]
    if options.against:
        own = [contestant for contestant in chosen if contestant.kind == "co_detr"]
        chosen += [from_other_checkout(contestant, options.against.resolve()) for contestant in own]
    return chosen


if __name__ == "__main__":
    sys.exit(main())
