"""The machine that trainings run on: processor, GPUs, and a line that describes it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def visible_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES of the GPUs that this process may use."""
    if not torch.cuda.is_available():
        return []
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen:
        return [name.strip() for name in chosen.split(",")]
    return [str(number) for number in range(torch.cuda.device_count())]


def describe(jobs: int, threads: int) -> str:
    """One line: software, processor, cores, GPUs, and how trainings share them."""
    parts = [f"torch {torch.__version__}", f"{_processor()}, {os.cpu_count()} cores"]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        parts.append(f"{len(names)} x {names[0]}")
    parts.append(f"{jobs} at once with {threads} thread(s) each")
    return "; ".join(parts)


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
