"""Copies from the host to the device that the host does not wait for.

``torch.tensor(values, device="cuda")`` and ``tensor.new_tensor(values)`` copy from pageable memory
and make the host wait for the whole queue of the device; in a training step that is done once,
where costs are fetched for matching, and should not be done for a handful of sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def tensor_on(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.tensor(values, dtype=dtype, device=device)`` without waiting for the device."""
    return to_device(torch.tensor(values, dtype=dtype), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor.to(device)`` without waiting for the device; work on the result is queued behind it.

    A copy is asynchronous only from pinned memory. Pinning a tensor that is not pinned yet costs
    a copy on the host, which is small against waiting.
    """
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu" and _can_pin():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _can_pin() -> bool:
    # Tracing has no memory to pin, and neither have the made-up devices of a machine without one.
    return torch.cuda.is_available() and not torch.compiler.is_compiling()
