#!/usr/bin/env python3
"""Makes COCO-format files, which training reads, from a YOLO or VOC folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from co_detr.command_line import start


def main(arguments: Sequence[str] | None = None) -> int:
    return start("convert", arguments)


if __name__ == "__main__":
    sys.exit(main())
