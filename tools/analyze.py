#!/usr/bin/env python3
"""Measures what trained models do and writes a report; `--help` shows examples."""

from __future__ import annotations

import os
import sys

# As in predict.py: threads that wait must not keep the cores busy; set before torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from co_detr.process_setup import silence_dependencies

silence_dependencies()

from collections.abc import Sequence

from co_detr.errors import exit_code
from co_detr.tools.analyze.command_line import parse_arguments, run


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return exit_code(lambda: run(options), options.debug)


if __name__ == "__main__":
    sys.exit(main())
