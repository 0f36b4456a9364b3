#!/usr/bin/env python3
"""Shows a trained model's boxes on a local web page; `--help` shows examples."""

from __future__ import annotations

import os
import sys

# As in train_net.py: threads that wait must not keep the cores busy; set before torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from co_detr.process_setup import silence_dependencies

silence_dependencies()

from co_detr.errors import exit_code
from co_detr.tools.demo.command_line import parse_arguments, run


def command_line() -> int:
    options = parse_arguments()
    return exit_code(lambda: run(options), options.debug)


if __name__ == "__main__":
    sys.exit(command_line())
