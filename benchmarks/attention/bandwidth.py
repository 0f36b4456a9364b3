"""What the memory of this machine can move, measured in the run it is compared with."""

import torch

from benchmarks.common import interleave


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by copying a tensor much larger than the caches."""
    size = 2**30 if device == "cuda" else 2**28
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, rounds=5, device=device)["copy"]
    return 2 * size / timing.median
