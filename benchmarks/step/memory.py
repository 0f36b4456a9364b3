"""Memory of this process, or of the CUDA device."""

from __future__ import annotations

import ctypes
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Usage:
    """What this process used so far: seconds of all its threads, those in the kernel, faults.

    Seconds of the processor say more than the clock where others use the machine, too.
    """

    cpu_seconds: float
    kernel_seconds: float
    page_faults: int

    @classmethod
    def now(cls) -> Usage:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return cls(usage.ru_utime + usage.ru_stime, usage.ru_stime, usage.ru_minflt)

    def since(self, before: Usage) -> Usage:
        return Usage(
            self.cpu_seconds - before.cpu_seconds,
            self.kernel_seconds - before.kernel_seconds,
            self.page_faults - before.page_faults,
        )


class MemoryMeter:
    """Current and peak memory in bytes.

    On the CPU that is the resident memory of the process with all libraries, on CUDA the memory
    of tensors. Where the system cannot reset the peak, it is that of the whole process life.
    """

    def __init__(self, device: str):
        self.on_cuda = device == "cuda"

    def current(self) -> int:
        if self.on_cuda:
            return torch.cuda.memory_allocated()
        return _status("VmRSS") if STATUS.exists() else _largest_resident()

    def peak(self) -> int:
        if self.on_cuda:
            return torch.cuda.max_memory_allocated()
        return _status("VmHWM") if STATUS.exists() else _largest_resident()

    def reset_peak(self) -> None:
        """Makes the current memory the peak."""
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # not Linux, or not allowed: see the class


def give_back_memory(device: str) -> None:
    """Returns unused memory to the system, for the next contestant's turn."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(key: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _largest_resident() -> int:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
