#!/usr/bin/env python3
"""Makes annotations of detections; `--help` shows examples."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from co_detr.process_setup import silence_dependencies

silence_dependencies()

from co_detr.errors import exit_code
from co_detr.tools.pseudo_label import parse_arguments, run


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
