#!/usr/bin/env python3
"""Trains or evaluates an experiment of configs/; `--help` shows examples.

The run itself is in `co_detr.engine.train`. An installed package has this as `co-detr train`.
"""

from __future__ import annotations

import sys

from co_detr.command_line import start


def command_line() -> int:
    return start("train")


if __name__ == "__main__":
    sys.exit(command_line())
