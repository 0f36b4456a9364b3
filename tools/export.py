#!/usr/bin/env python3
"""Exports a trained detector to ONNX or torch.export; `--help` shows examples."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from co_detr.command_line import start


def main(arguments: Sequence[str] | None = None) -> int:
    return start("export", arguments)


if __name__ == "__main__":
    sys.exit(main())
