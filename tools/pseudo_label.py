#!/usr/bin/env python3
"""Makes annotations of detections; `--help` shows examples."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from co_detr.command_line import start


def main(arguments: Sequence[str] | None = None) -> int:
    return start("pseudo-label", arguments)


if __name__ == "__main__":
    sys.exit(main())
