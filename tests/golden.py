"""Finds the golden tensors of the reference implementation."""

import functools
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
UNITS = (ROOT / "tests" / "data" / "units.pt", ROOT.parent / "shared" / "golden" / "units.pt")


@functools.cache
def load_units() -> dict:
    """The unit-level golden inputs and outputs, one entry per part; skips where there are none."""
    for path in UNITS:
        if path.exists():
            return torch.load(path, weights_only=True)
    pytest.skip(f"no unit goldens: neither of {', '.join(map(str, UNITS))} exists")
