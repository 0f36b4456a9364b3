#!/usr/bin/env python
"""Lists all models: parameters in training and at inference beside the published numbers.

    python tools/list_models.py                        # all
    python tools/list_models.py co_dino_r50 quickstart
    python tools/list_models.py --markdown             # the table of docs/models.md

Models are built without memory for their weights; a full list takes about a minute.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from co_detr.model_zoo import ZOO, ZooEntry, empty_model, get_config

HEADER = ("config", "M par. training", "inference", "published", "data", "AP", "official config")


@dataclass(frozen=True)
class ModelSize:
    """Millions of parameters, with and without what only training uses."""

    training: float
    inference: float


def measure(name: str) -> ModelSize:
    """Builds the model of a config on the meta device and counts."""
    model = empty_model(get_config(name))
    training = count_parameters(model)
    model.strip_auxiliary()
    return ModelSize(training / 1e6, count_parameters(model) / 1e6)


def count_parameters(model: nn.Module) -> int:
    """Frozen ones too, and the scale and shift of frozen norms, which Detectron2 has as buffers."""
    frozen = [norm for norm in model.modules() if isinstance(norm, FrozenBatchNorm2d)]
    affine = sum(norm.weight.numel() + norm.bias.numel() for norm in frozen)
    return affine + sum(parameter.numel() for parameter in model.parameters())


def row(entry: ZooEntry, size: ModelSize) -> tuple[str, ...]:
    return (
        entry.name,
        f"{size.training:.1f}",
        f"{size.inference:.1f}",
        entry.parameters,
        entry.dataset,
        "" if entry.ap is None else f"{entry.ap:.1f}",
        entry.official_config or "",
    )


def markdown_row(entry: ZooEntry, size: ModelSize) -> str:
    official = f"`{entry.official_config}`" if entry.official_config else ""
    cells = [f"`{entry.name}`", entry.summary, *row(entry, size)[1:-1], official, entry.note]
    return f"| {' | '.join(cells)} |"


def print_markdown(names: list[str]) -> None:
    titles = (HEADER[0], "model", *HEADER[1:], "note")
    print(f"| {' | '.join(titles)} |")
    print(f"|{'---|' * len(titles)}")
    for name in names:
        print(markdown_row(ZOO[name], measure(name)), flush=True)


def print_columns(names: list[str]) -> None:
    widths = [max(len(name) for name in ZOO), 15, 9, 14, 10, 4, 0]

    def line(cells: tuple[str, ...]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))

    print(line(HEADER))
    for name in names:
        print(line(row(ZOO[name], measure(name))).rstrip(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="configs without .py; default all")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in ZOO]
    if unknown:
        parser.error(f"no model {unknown[0]}; there are {', '.join(ZOO)}")
    names = arguments.names or list(ZOO)
    (print_markdown if arguments.markdown else print_columns)(names)


if __name__ == "__main__":
    main()
