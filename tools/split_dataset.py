#!/usr/bin/env python3
"""Divides a COCO-format file into folds, or into train and val; `--help` shows examples."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from co_detr.process_setup import silence_dependencies

silence_dependencies()

from co_detr.errors import exit_code
from co_detr.tools.split_dataset import parse_arguments, run


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
