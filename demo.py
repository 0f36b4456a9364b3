#!/usr/bin/env python3
"""Shows a trained model's boxes on a local web page; `--help` shows examples."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from co_detr.command_line import start


def main(arguments: Sequence[str] | None = None) -> int:
    return start("demo", arguments)


if __name__ == "__main__":
    sys.exit(main())
