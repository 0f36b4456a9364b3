"""Averages the weights of several checkpoints of one run.

    python tools/average_checkpoints.py output/mine/model_0008999.pth \
        output/mine/model_0009999.pth output/mine/model_final.pth --output output/mine/average.pth

Only checkpoints of one training can be averaged, or of trainings that began with the same trained
weights: others have put the same things in different places. Statistics of batch norms are
averaged, too, which is right where they are frozen, as in all configs here. The result holds
weights and class names only: it is evaluated and used, and a training may start from it.

Exit status: 0, or 2 after an error that is explained in one sentence.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from co_detr.errors import CheckpointError, ConfigError
from co_detr.files import written_whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of tools/average_checkpoints.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="FILE.pth", help="of one run")
    add("--output", required=True, metavar="FILE.pth", help="file to write")
    add(
        "--weights",
        choices=("ema", "raw"),
        default="ema",
        help="of files that hold two sets: the averaged ones (default), or the others",
    )
    add("--force", action="store_true", help="replace a file that is there")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Reads one file after the other, writes the average, and tells how far they lay apart.

    Raises:
        CheckpointError: if a file cannot be read, or is of another model or other classes.
        ConfigError: if there are fewer than two files, or the output is one of them.
    """
    import torch

    from co_detr.checkpoint.reading import (
        choose_weights,
        has_averaged,
        plain_state,
        read_checkpoint,
        stored_class_names,
    )

    if len(options.checkpoints) < 2:
        raise ConfigError("an average needs at least two checkpoints: name another.")
    if os.path.exists(options.output) and not options.force:
        raise ConfigError(f"{options.output} exists: choose another --output, or add --force.")
    average, first, is_averaged = None, "", False
    for path in options.checkpoints:
        content = read_checkpoint(path)
        if average is None:
            is_averaged = has_averaged(content)
        elif options.weights == "ema" and has_averaged(content) != is_averaged:
            with_set, without = (first, path) if is_averaged else (path, first)
            raise CheckpointError(
                f"{with_set} has averaged weights (EMA) and {without} has none: average what is "
                "alike, with --weights raw."
            )
        state = plain_state(choose_weights(content, options.weights, path), path)
        names = stored_class_names(content)
        if average is None:
            average, first = Average(state, names), path
        else:
            average.require_same(state, names, first, path)
        average.add(state)
    content = {"model": average.state(), "averaged_from": list(options.checkpoints)}
    if average.class_names is not None:
        content["class_names"] = average.class_names
    try:
        with written_whole(options.output, "wb") as file:
            torch.save(content, file)
    except OSError as error:
        raise CheckpointError(
            f"{options.output} cannot be written ({error.strerror}): name another."
        ) from error
    print(average.table())
    print(f"Wrote the average of {len(options.checkpoints)} checkpoints: {options.output}")


class Average:
    """The mean of weights that are added one after the other, in double precision.

    Args:
        state: the first weights, whose names, shapes and types all others have to have.
        class_names: that the first file says it was trained on.
    """

    def __init__(self, state: Mapping[str, Tensor], class_names: list[str] | None) -> None:
        import torch

        self.class_names = class_names
        self._last = dict(state)
        self._number = 0
        floating = {name: value for name, value in state.items() if value.is_floating_point()}
        self._sum = {name: torch.zeros_like(v, dtype=torch.float64) for name, v in floating.items()}
        self._squares = {name: 0.0 for name in floating}

    def require_same(
        self, state: Mapping[str, Tensor], class_names: list[str] | None, first: str, path: str
    ) -> None:
        """Raises a CheckpointError if the weights are of another model or other classes."""
        from co_detr.checkpoint.reading import shorten

        if class_names != self.class_names:
            raise CheckpointError(
                f"{path} was trained on the classes ({shorten(class_names or ['unknown'])}), "
                f"{first} on ({shorten(self.class_names or ['unknown'])}): average checkpoints of "
                "one run."
            )
        other = [
            name
            for name in {**self._last, **state}
            if _form(state, name) != _form(self._last, name)
        ]
        if other:
            parts = list(dict.fromkeys(map(part_of, other)))
            raise CheckpointError(
                f"{path} and {first} differ in the names or shapes of {len(other)} tensors, in "
                f"{shorten(parts)} (the first: {other[0]}): average checkpoints of one model."
            )

    def add(self, state: Mapping[str, Tensor]) -> None:
        """Adds weights; of whole numbers, such as counters, the last ones count."""
        self._number += 1
        self._last = dict(state)
        for name, total in self._sum.items():
            value = state[name].double()
            total += value
            self._squares[name] += float((value**2).sum())

    def state(self) -> dict[str, Tensor]:
        """The mean, in the types of the files."""
        mean = {
            name: (total / self._number).to(self._last[name].dtype)
            for name, total in self._sum.items()
        }
        return self._last | mean

    def table(self) -> str:
        """By part of the model, how far the files lie from their mean, relative to the weights."""
        spread: dict[str, float] = defaultdict(float)
        size: dict[str, float] = defaultdict(float)
        for name, total in self._sum.items():
            of_mean = float(((total / self._number) ** 2).sum())
            spread[part_of(name)] += max(0.0, self._squares[name] / self._number - of_mean)
            size[part_of(name)] += of_mean
        rows = [
            (part, f"{100 * (spread[part] / size[part]) ** 0.5:.2f} %" if size[part] else "-")
            for part in size
        ]
        return tabulate(rows, ("part", "distance from the average"), tablefmt="github")


def _form(state: Mapping[str, Tensor], name: str) -> tuple[torch.Size, torch.dtype] | None:
    return (state[name].shape, state[name].dtype) if name in state else None


def part_of(name: str) -> str:
    """The part of the model that a tensor is in: "backbone", "auxiliary.roi"."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] in ("auxiliary", "queries") else 1])
