"""Finds the golden tensors of the reference implementation."""

import functools
from pathlib import Path

from tests.parity.oracle.golden import load_golden

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "tests" / "data"
# The complete set, which a clone does not have.
COMPLETE = ROOT.parent / "shared" / "golden"


@functools.cache
def load_units() -> dict:
    """The shipped unit-level inputs and outputs, one entry per part; not to be changed."""
    return load_golden(SHIPPED / "units.pt.xz")
