"""What every benchmark needs: the environment, interleaved timing, tables and JSON."""

from .environment import environment
from .report import format_ms, markdown_table, write_json
from .timing import Contestant, Timing, interleave, ratio

__all__ = [
    "Contestant",
    "Timing",
    "environment",
    "format_ms",
    "interleave",
    "markdown_table",
    "ratio",
    "write_json",
]
