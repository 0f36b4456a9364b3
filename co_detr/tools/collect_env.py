"""Prints what a bug report needs: ``co-detr info``, or ``python -m co_detr.tools.collect_env``.

Every MSDeformAttn backend is tried, forward and backward, against the fp64 reference.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import co_detr

if TYPE_CHECKING:
    import torch

LEVEL_SHAPES = [(6, 7), (3, 4)]


def attention_case(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Value, locations (some outside), weights; require gradients. Same numbers on every call."""
    import torch

    generator = torch.Generator().manual_seed(0)
    pixels = sum(height * width for height, width in LEVEL_SHAPES)
    value = torch.randn(2, pixels, 2, 8, generator=generator, dtype=torch.float64)
    locations = torch.rand(2, 5, 2, 2, 4, 2, generator=generator, dtype=torch.float64) * 1.2 - 0.1
    weights = torch.rand(2, 5, 2, 2, 4, generator=generator, dtype=torch.float64)
    return [t.to(device, dtype).requires_grad_() for t in (value, locations, weights)]


def outputs_of(function, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Output and the three gradients of ``function``, on the CPU in fp64."""
    import torch

    value, locations, weights = attention_case(dtype, device)
    output = function(value, LEVEL_SHAPES, locations, weights)
    # A fixed but uneven gradient.
    grad = torch.linspace(-1, 1, output.numel(), dtype=dtype, device=device).view_as(output)
    grads = torch.autograd.grad(output, (value, locations, weights), grad)
    return [tensor.detach().cpu().double() for tensor in (output, *grads)]


def check_backend(function, device: str) -> str:
    """One phrase: whether ``function`` equals the fp64 reference on ``device`` in fp32."""
    import torch

    from co_detr.layers import ms_deform_attn_reference

    expected = outputs_of(ms_deform_attn_reference, torch.float64, "cpu")
    try:
        actual = outputs_of(function, torch.float32, device)
    except RuntimeError as error:
        return f"FAILS: {str(error).splitlines()[0]}"
    worst = max(
        ((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True)
    )
    verdict = "works" if worst < 1e-4 else "WRONG"
    return f"{verdict} (forward and backward, largest relative error {worst:.1e})"


def describe_backend(device: str) -> str:
    """Whether the compiled kernels for ``device`` exist and work."""
    import torch

    from co_detr.layers import ms_deform_attn
    from co_detr.layers.deformable_attention import HAS_EXTENSION, KERNEL_DEVICES

    if device not in KERNEL_DEVICES:
        reason = "it was built without" if HAS_EXTENSION else "there is no co_detr._C"
        return f"not built ({reason}): the reference is used"
    if device == "cuda" and not torch.cuda.is_available():
        return "built, not checked: no CUDA device is visible"
    return check_backend(ms_deform_attn, device)


def describe_detectron2() -> str:
    """Version, distribution name and folder of the installed Detectron2."""
    try:
        import detectron2
    except ImportError as error:
        return f"not importable: {error}"
    names = importlib.metadata.packages_distributions().get("detectron2", [])
    distributions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in dict.fromkeys(names)
    )
    origin = distributions or "no distribution: a folder on the import path"
    return f"{detectron2.__version__} from {Path(detectron2.__file__).parent} ({origin})"


def first_line(command: list[str]) -> str:
    """First line that a command prints, or why it did not run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not available: {error}"
    return (result.stdout or result.stderr).strip().partition("\n")[0] or "printed nothing"


def describe_toolkit() -> str:
    """Version and place of the CUDA compiler."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    search_path = os.pathsep.join(str(Path(folder, "bin")) for folder in folders if folder)
    nvcc = shutil.which("nvcc", path=search_path) or shutil.which("nvcc")
    if nvcc is None:
        return "none found"
    result = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20)
    release = [line for line in result.stdout.splitlines() if "release" in line]
    return f"{release[0].strip() if release else 'unknown version'} ({nvcc})"


def describe_gpus() -> str:
    """Names and compute capabilities of the visible CUDA devices."""
    import torch

    if not torch.cuda.is_available():
        return "none visible"
    return "; ".join(
        "{} (compute capability {}.{})".format(
            torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i)
        )
        for i in range(torch.cuda.device_count())
    )


def collect() -> dict[str, str]:
    """Everything that is printed, in order."""
    import torch

    from co_detr.layers import ms_deform_attn_reference

    return {
        "platform": platform.platform(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "co_detr": f"{co_detr.__version__} from {Path(co_detr.__file__).parent}",
        "torch": f"{torch.__version__} from {Path(torch.__file__).parent}",
        "torch threads": str(torch.get_num_threads()),
        "torch CUDA": torch.version.cuda or "built without CUDA",
        "CUDA toolkit": describe_toolkit(),
        "CUDA devices": describe_gpus(),
        "detectron2": describe_detectron2(),
        "C++ compiler": first_line([os.environ.get("CXX", "c++"), "--version"]),
        "MSDeformAttn, CPU kernel": describe_backend("cpu"),
        "MSDeformAttn, CUDA kernel": describe_backend("cuda"),
        "MSDeformAttn, reference": check_backend(ms_deform_attn_reference, "cpu"),
    }


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of ``co-detr info``: none."""
    return argparse.ArgumentParser(description="What is installed and works.").parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Prints everything."""
    for key, text in collect().items():
        print(f"{key:<26} {text}")


if __name__ == "__main__":
    run(parse_arguments())
