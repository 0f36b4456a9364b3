#!/usr/bin/env python3
"""Averages the weights of several checkpoints of one run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from co_detr.command_line import start


def main(arguments: Sequence[str] | None = None) -> int:
    return start("average", arguments)


if __name__ == "__main__":
    sys.exit(main())
