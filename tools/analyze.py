#!/usr/bin/env python3
"""Measures what trained models do and writes a report; `--help` shows examples."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from co_detr.command_line import start


def main(arguments: Sequence[str] | None = None) -> int:
    return start("analyze", arguments)


if __name__ == "__main__":
    sys.exit(main())
