#!/usr/bin/env python3
"""Exports a trained detector to ONNX or torch.export; `--help` shows examples."""

from __future__ import annotations

import os
import sys

# As in predict.py: threads that wait must not keep the cores busy; set before torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from co_detr.noise import silence_dependencies

silence_dependencies()

from collections.abc import Sequence

from co_detr.engine.launch import report
from co_detr.errors import UserError
from co_detr.export.command_line import parse_arguments, run


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        run(options)
    except UserError as error:
        report(error, options.debug)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
