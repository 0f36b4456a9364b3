#!/usr/bin/env python3
"""Looks into one training step of Co-DETR (K = 2, 800x1333, batch 2): waits, or time by kernel.

python -m scripts.gpu.step_report waits      where the host waits for the device, line by line
python -m scripts.gpu.step_report profile    the operators and kernels that take most time
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.step.case import Case
from benchmarks.step.co_detr_subject import CoDETRSubject
from benchmarks.step.contestants import BUILT_IN
from benchmarks.step.waits import count_waits, own

WARM_UP = 3


def training_step(device: str, tiny: bool) -> Callable[[], None]:
    """Forward, backward, clipping and update, with TF32 as in a usual training."""
    height, width = (128, 160) if tiny else (800, 1333)
    case = Case("train", height, width, batch=2, device=device, precision="tf32")
    subject = CoDETRSubject(BUILT_IN["k2"], case)
    case.set_precision()
    optimizer = subject.optimizer()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        subject.loss().backward()
        torch.nn.utils.clip_grad_norm_(subject.model.parameters(), 0.1)
        optimizer.step()

    return step


def report_waits(step: Callable[[], None], options: argparse.Namespace) -> None:
    found = count_waits(step, options.device)
    print("Waits of one step, by the innermost line of this project and its detection libraries:")
    for place, count in found.most_common():
        print(f"{count:6} {place}")
    figures = {"waits": found.total(), "of them in co_detr": own(found)}
    print(f"figures: {json.dumps(figures)}")


def report_profile(step: Callable[[], None], options: argparse.Namespace) -> None:
    on_cuda = options.device == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        if on_cuda:
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    key = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
    table = averages.table(sort_by=key, row_limit=40, max_name_column_width=90)
    print(table)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(table + "\n")
    times = (
        _kernel_times(averages)
        if on_cuda
        else Counter({average.key: average.self_cpu_time_total for average in averages})
    )
    shares = {name[:48]: f"{time / times.total():.0%}" for name, time in times.most_common(3)}
    print(f"figures: {json.dumps({'ms': round(times.total() / 1000, 1)} | shares)}")


def _kernel_times(averages) -> Counter[str]:
    """Microseconds by kernel; operators, which have the time of their kernels too, are left out."""
    on_device = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA]
    # Attributes are called after devices in general since torch 2.5.
    name = "self_device_time_total"
    if on_device and not hasattr(on_device[0], name):
        name = "self_cuda_time_total"
    return Counter({average.key: getattr(average, name) for average in on_device})


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", choices=("waits", "profile"))
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="128x160, to see that it works")
    parser.add_argument("--output", type=Path, metavar="FILE", help="of the profile")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    step = training_step(options.device, options.tiny)
    for _ in range(1 if options.tiny else WARM_UP):
        step()
    {"waits": report_waits, "profile": report_profile}[options.report](step, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
