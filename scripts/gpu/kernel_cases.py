#!/usr/bin/env python3
"""Runs every CUDA kernel of MSDeformAttn on small problems, for compute-sanitizer to look at.

    compute-sanitizer --tool memcheck python -m scripts.gpu.kernel_cases --device cuda

Inputs are made on the host and results compared there, so that little else runs on the device.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from co_detr.layers import ms_deform_attn, ms_deform_attn_reference
from co_detr.layers.deformable_attention import KERNEL_DEVICES
from tests.layers.cases import Case, outputs_and_gradients

LEVELS = ((6, 7), (3, 4), (2, 2), (1, 1), (1, 3))
BASE = Case(batch=2, queries=37, heads=3, channels=32, level_shapes=LEVELS[:4])
# 32 channels, 4 points and 3 to 5 levels have kernels of their own.
CASES = [
    *(replace(BASE, level_shapes=LEVELS[:count]) for count in (3, 4, 5)),
    replace(BASE, channels=40, points=3),
    replace(BASE, channels=5, points=1, level_shapes=LEVELS[:1]),
]
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def worst_error(case: Case, dtype: torch.dtype, device: str) -> float:
    """Largest error of output and gradients against fp64, relative to the largest entry."""
    tensors = case.tensors(dtype)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)
    expected = outputs_and_gradients(ms_deform_attn_reference, case, exact)
    moved = tuple(tensor.detach().to(device).requires_grad_() for tensor in tensors)
    actual = outputs_and_gradients(ms_deform_attn, case, moved)
    return max(
        ((actual[name].cpu().double() - wanted).abs().max() / wanted.abs().max()).item()
        for name, wanted in expected.items()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    device = parser.parse_args(arguments).device
    if device not in KERNEL_DEVICES:
        parser.error(f"co_detr was installed without a kernel for {device}")
    errors = {}
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        for case in CASES:
            for dtype in TOLERANCES:
                errors[deterministic, case, dtype] = worst_error(case, dtype, device)
    wrong = {key: error for key, error in errors.items() if not error <= TOLERANCES[key[2]]}
    for key, error in wrong.items():
        print(f"WRONG {key}: relative error {error:.1e}")
    print(f"figures: {json.dumps({'problems': len(errors), 'wrong': len(wrong)})}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
