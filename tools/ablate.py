#!/usr/bin/env python3
"""Trains the variants of a grid and compares them in one table; `--help` shows examples."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from co_detr.command_line import start


def main(arguments: Sequence[str] | None = None) -> int:
    return start("ablate", arguments)


if __name__ == "__main__":
    sys.exit(main())
