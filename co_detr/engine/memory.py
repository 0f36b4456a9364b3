"""Peak memory of this process, on its GPU or in the machine."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass

import torch

GPU_PEAK = "gpu_peak_mib"  # under which metrics.jsonl has what tensors took on the GPU so far


@dataclass(frozen=True)
class PeakMemory:
    """The most memory that was in use so far.

    Attributes:
        used: bytes. On a GPU what PyTorch has reserved there, on the CPU the resident memory of
            this process with all its libraries (without processes that load images).
        total: bytes that the GPU or the machine has.
    """

    used: int
    total: int

    @classmethod
    def of(cls, device: str | torch.device) -> PeakMemory:
        device = torch.device(device)
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            return cls(torch.cuda.max_memory_reserved(device), total)
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return cls(used, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def __str__(self) -> str:
        return f"{self.used / 2**30:.2f} of {self.total / 2**30:.2f} GiB"
