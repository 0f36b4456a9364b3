#!/usr/bin/env python3
"""Makes the data of the quick start: handwritten digits on photographs, in COCO format."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from co_detr.command_line import start


def main(arguments: Sequence[str] | None = None) -> int:
    return start("digits", arguments)


if __name__ == "__main__":
    sys.exit(main())
