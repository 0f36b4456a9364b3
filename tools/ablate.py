#!/usr/bin/env python3
"""Trains the variants of a grid and compares them in one table; `--help` shows examples."""

from __future__ import annotations

import sys

from co_detr.process_setup import silence_dependencies

silence_dependencies()

from collections.abc import Sequence

from co_detr.errors import exit_code
from co_detr.tools.ablate.command_line import parse_arguments, run


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return exit_code(lambda: run(options), options.debug)


if __name__ == "__main__":
    sys.exit(main())
