"""Converts checkpoints of the reference Co-DETR to this project's names, or back.

    python tools/convert_official.py IN.pth OUT.pth [--config-file configs/NAME.py] [--ema]
    python tools/convert_official.py IN.pth OUT.pth --reverse

Every tensor is accounted for: one that is missing, unknown or of another shape is an error. What
is left out on purpose is counted in the report. Without --config-file the config whose names and
shapes match is found. Training and evaluation convert official files by themselves; this tool is
for keeping the result, for the second set of weights (--ema) and for the way back.

Exit status: 0, or 2 after an error that is explained in one sentence.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from co_detr.process_setup import silence_dependencies

silence_dependencies()

import torch
from torch import Tensor

from co_detr.checkpoint.fetching import local_file
from co_detr.checkpoint.loading import ignored_lines
from co_detr.checkpoint.official import (
    Conversion,
    convert_official,
    official_state_dict,
    restore_official,
)
from co_detr.checkpoint.reading import (
    choose_weights,
    has_averaged,
    plain_state,
    read_checkpoint,
    stored_class_names,
    unwrap,
)
from co_detr.engine.config import load_config
from co_detr.errors import CheckpointError, exit_code
from co_detr.model_zoo import choose_config, config_file, empty_model


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    return exit_code(lambda: convert(options))


def convert(options: argparse.Namespace) -> None:
    """Reads, converts, writes and reports.

    Raises:
        CheckpointError: if the file cannot be read, or does not fit the config.
    """
    options.input = local_file(options.input)
    if os.path.exists(options.output) and os.path.samefile(options.input, options.output):
        raise CheckpointError(f"{options.output} would replace its own input: name another file.")
    content = read_checkpoint(options.input, options.unsafe)
    if options.reverse and has_averaged(content):
        print(f"{options.input}: its averaged weights (EMA) are converted, not the raw ones")
        content = choose_weights(content, "ema", options.input)
    state = _state_dict(content, options)
    path, overrides = options.config_file, list(options.opts)
    if path is None:
        choice = choose_config(state, official=not options.reverse)
        path = str(config_file(choice.name))
        print(f"config: {path} (by names and shapes; the same: {', '.join(choice.same) or 'none'})")
        if choice.num_classes != load_config(path).model.num_classes:
            overrides.append(f"model.num_classes={choice.num_classes}")
    model = empty_model(load_config(path, overrides))
    change = restore_official if options.reverse else convert_official
    conversion = change(state, model)
    _write(conversion, content, options)
    _report(conversion, len(state), len(unwrap(content)) - len(state), options)
    if not options.reverse:
        settings = " ".join([*overrides, f"train.init_checkpoint={options.output}"])
        print(f"use it with: --config-file {path} {settings}")


def _state_dict(content: dict[str, Any], options: argparse.Namespace) -> dict[str, Tensor]:
    if options.reverse:
        return plain_state(content, options.input)
    return official_state_dict(content, options.input, options.ema)


def _write(conversion: Conversion, content: dict[str, Any], options: argparse.Namespace) -> None:
    names = stored_class_names(content)
    if options.reverse:
        written = {"meta": {"CLASSES": names}, "state_dict": conversion.state_dict}
    else:
        written = {"model": conversion.state_dict, "__author__": "co_detr, from the reference"}
        written |= {} if names is None else {"class_names": names}
    temporary = f"{options.output}.tmp"
    torch.save(written, temporary)
    os.replace(temporary, options.output)


def _report(
    conversion: Conversion, num_read: int, num_copies: int, options: argparse.Namespace
) -> None:
    converted = num_read - len(conversion.ignored)
    made = len(conversion.state_dict) - len(conversion.restored)
    as_many = "" if made == converted else f" (as {made}: one holds a number for each head)"
    print(f"{options.input}: {num_read} tensors read, {converted} converted{as_many}")
    for line in ignored_lines(conversion.ignored):
        print(line)
    if options.ema:
        print(f"  {num_copies} of the file left out: the first set, as --ema takes the second")
    if conversion.restored:
        print(f"  {len(conversion.restored)} made anew that are left out on the way to us")
    if conversion.absent:
        print(f"  not in the result: {', '.join(conversion.absent)} (load it with strict=False)")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("input", metavar="IN.pth", help="checkpoint to read")
    add("output", metavar="OUT.pth", help="file to write")
    add("--config-file", metavar="FILE", help="config of the model; default: found by the tensors")
    add(
        "--ema",
        action="store_true",
        help="convert the second set of weights (ema_...); in files that mmdet's hook wrote after "
        "an epoch, the plain names hold the average already and this set the last weights",
    )
    add("--reverse", action="store_true", help="from this project's names to the reference's")
    add("--unsafe", action="store_true", help="let IN.pth run code; only for authors you trust")
    add("opts", nargs="*", metavar="KEY=VALUE", help="override of a config key")
    options = parser.parse_intermixed_args(arguments)
    if options.reverse and options.ema:
        parser.error("--ema is about official files: leave it or --reverse out")
    if options.opts and options.config_file is None:
        parser.error("overrides need --config-file")
    return options


if __name__ == "__main__":
    sys.exit(main())
