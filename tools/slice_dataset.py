#!/usr/bin/env python3
"""Cuts an annotated data set in COCO format into tiles; `--help` shows an example."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from co_detr.command_line import start


def main(arguments: Sequence[str] | None = None) -> int:
    return start("slice", arguments)


if __name__ == "__main__":
    sys.exit(main())
