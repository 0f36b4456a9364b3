#!/usr/bin/env python3
"""Combines detections of several models, or of folds, in one file; `--help` shows examples."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from co_detr.command_line import start


def main(arguments: Sequence[str] | None = None) -> int:
    return start("combine", arguments)


if __name__ == "__main__":
    sys.exit(main())
