"""Parameters, FLOPs and activations of a model, part by part.

    python tools/analyze_model.py --config-file configs/co_detr_r50.py
    python tools/analyze_model.py --config-file configs/co_detr_r50.py --training --size 640x896

Shows what the auxiliary part costs: parameters always, FLOPs in training, nothing at test time.
One multiply-add is one FLOP; weights are random and images are noise, on the CPU. What trained
models do on real images: tools/analyze.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from co_detr.process_setup import silence_dependencies

silence_dependencies()

import torch
from detectron2.config import instantiate
from tabulate import tabulate

from co_detr.engine.config import channels_of, learns_masks, load_config
from co_detr.engine.memory_use import random_batch
from co_detr.errors import exit_code
from co_detr.tools.complexity import Complexity, PartCost, analyze


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Analyzes, prints and writes what the options ask for."""
    cfg = load_config(options.config_file, options.opts)
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    model.compare_detectors = False  # an evaluation may run every detector; a user runs one
    height, width = options.size
    batch = random_batch(
        height,
        width,
        options.batch,
        options.gts,
        model.num_classes,
        masks=learns_masks(cfg.model),
        channels=channels_of(cfg.model),
    )
    passes = {"inference": analyze(model.eval(), batch)}
    if options.training:
        passes["training"] = analyze(model.train(), batch)
    for name, complexity in passes.items():
        print(f"\n{options.config_file}, {name}, {options.batch} x {height}x{width}\n")
        print(format_table(complexity))
    if options.output is not None:
        content = {
            "config_file": options.config_file,
            "overrides": options.opts,
            "input": {"height": height, "width": width, "batch": options.batch},
            **{name: as_json(complexity) for name, complexity in passes.items()},
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(content, indent=2) + "\n")
        print(f"\nWrote {options.output}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="experiment, such as configs/NAME.py")
    add("--size", type=image_size, default=(800, 1333), metavar="HxW", help="default: 800x1333")
    add("--batch", type=int, default=1, help="images (default: 1)")
    add("--training", action="store_true", help="also the forward pass of a training step")
    add("--gts", type=int, default=8, help="ground truths per training image (default: 8)")
    add("--output", type=Path, metavar="FILE", help="write JSON, too")
    add("opts", nargs="*", metavar="KEY=VALUE", help="override of a config key")
    return parser.parse_intermixed_args(arguments)


def image_size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, as 800x1333") from None
    return height, width


def format_table(complexity: Complexity) -> str:
    """The parts, their total, the share of the auxiliary parts, and what was not counted."""
    rows = [format_row(part) for part in complexity.parts]
    rows += [format_row(complexity.total), format_row(complexity.auxiliary)]
    headers = ["part", "parameters (M)", "GFLOPs", "activations (M)"]
    align = ("left", "right", "right", "right")
    table = tabulate(rows, headers, tablefmt="github", colalign=align, disable_numparse=True)
    calls = ", ".join(f"{name} x{number}" for name, number in complexity.uncounted.items())
    return f"{table}\n\nOperators without a count: {calls or 'none'}."


def format_row(part: PartCost) -> list[str]:
    return [
        part.name,
        f"{part.parameters / 1e6:.2f}",
        f"{part.flops / 1e9:.2f}",
        f"{part.activations / 1e6:.2f}",
    ]


def as_json(complexity: Complexity) -> dict:
    return {
        **asdict(complexity),
        "total": asdict(complexity.total),
        "auxiliary": asdict(complexity.auxiliary),
    }


if __name__ == "__main__":
    sys.exit(main())
