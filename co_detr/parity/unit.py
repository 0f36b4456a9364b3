"""One entry of ``units.pt``: what a unit's check reads and compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from co_detr.parity.differences import Difference
from co_detr.parity.report import Report

# Relative to the largest magnitude of the entry.
FLOAT64 = 1e-10
FLOAT32 = 2e-6  # a few roundings of 6e-8 each, and other library versions' exp, log and sin


@dataclass(frozen=True)
class Unit:
    """Inputs and expected outputs of one function of the reference.

    Attributes:
        report: receives every reading as ``given`` and every comparison.
        name: of the entry, for example ``giou`` or ``focal[2]``.
        entry: the golden values by key.
    """

    report: Report
    name: str
    entry: dict[str, Any]

    def has(self, key: str) -> bool:
        return key in self.entry

    def __getitem__(self, key: str) -> Any:
        """An input of the check.

        Raises:
            KeyError: if the entry has no such key.
        """
        self.report.given(f"{self.name}.{key}", "input")
        return self.entry[key]

    def expected(self, key: str) -> Any:
        """An expected output, to explain a difference; does not account for it."""
        return self.entry[key]

    def close(self, key: str, actual: Any, rtol: float = FLOAT32, **options: Any) -> None:
        """See ``Report.close``, which takes the ``options``."""
        self.report.close(f"{self.name}.{key}", actual, rtol=rtol, **options)

    def exact(self, key: str, actual: Any) -> None:
        self.report.exact(f"{self.name}.{key}", actual)

    def known(self, key: str, difference: Difference, holds: bool, note: str) -> None:
        self.report.known(f"{self.name}.{key}", difference, holds, note)


def level_shapes(shapes: Any) -> list[tuple[int, int]]:
    """``(L, 2)`` tensor or nested list -> ``(height, width)`` Python integers."""
    return [(int(height), int(width)) for height, width in shapes]
