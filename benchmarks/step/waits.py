"""Where a step makes the host wait for a CUDA device."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import detectron2
import fvcore
import torch
import torchvision

import co_detr

PACKAGES = [Path(package.__file__).parent for package in (co_detr, detectron2, torchvision, fvcore)]
ELSEWHERE = "elsewhere"
_WARNING = "synchronizing CUDA operation"  # part of what PyTorch says


def innermost_line() -> str:
    """That of one of `PACKAGES`, as "co_detr/modeling/losses.py:88"; `ELSEWHERE` without one.

    The backward pass runs in threads of its own, so that its waits come from nowhere.
    """
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        for package in PACKAGES:
            if path.is_relative_to(package):
                return f"{path.relative_to(package.parent)}:{frame.lineno}"
    return ELSEWHERE


def own(waits: Counter[str]) -> int:
    """How many of them are due to this project's lines."""
    return sum(count for place, count in waits.items() if place.startswith("co_detr/"))


def count_waits(step: Callable[[], object], device: str) -> Counter[str]:
    """Waits during ``step`` by `innermost_line`; none anywhere but on ``cuda``."""
    found: Counter[str] = Counter()

    def note(message, category, filename, lineno, file=None, line=None) -> None:
        if _WARNING in str(message):
            found[innermost_line()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return found
