#!/usr/bin/env python3
"""Checks a data set and draws the first training samples as the model gets them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from co_detr.command_line import start


def main(arguments: Sequence[str] | None = None) -> int:
    return start("inspect", arguments)


if __name__ == "__main__":
    sys.exit(main())
