"""Installs co_detr and builds its MSDeformAttn kernels (C++ for the CPU, CUDA where possible).

    pip install --no-build-isolation --no-deps -e .
    python -m build --no-isolation        # sdist and wheel in dist/, see docs/get_started.md

From PyTorch 2.10 on, the kernels use its stable interface alone: what is built once works with
every PyTorch from 2.10 and every Python from 3.10 on. With an older one they are built for it.

Environment:
    CUDA_HOME              the CUDA toolkit, when it is not the one of nvcc or /usr/local/cuda
    FORCE_CUDA=1           fail when the CUDA kernels cannot be built (default: build if possible)
    CO_DETR_NO_CUDA=1      build the CPU kernels only
    CO_DETR_NO_EXT=1       build no kernels: the slow PyTorch reference is used
    TORCH_CUDA_ARCH_LIST   GPU architectures, e.g. "8.0;9.0+PTX", 7.0 or newer; default: the GPU
                           that is there, or else all in ARCHITECTURES that the toolkit knows
    MAX_JOBS               parallel compiler processes

No GPU is needed to build the CUDA kernels.
"""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
STABLE_SINCE = (2, 10)  # of PyTorch
KERNELS = "co_detr/layers/csrc/ms_deform_attn"
BUILD_COMMAND = "pip install --no-build-isolation --no-deps -e ."

# First CUDA version that knows them -> GPU architectures. Code for 8.0 runs on 8.6 and 8.9 as well;
# GPUs newer than all of these compile the PTX of the last one when it is first used.
ARCHITECTURES = {
    (11, 0): ("7.5", "8.0"),  # T4, RTX 20; A100, RTX 30 and RTX 40
    (11, 8): ("9.0",),  # H100
    (12, 8): ("10.0", "12.0"),  # B200; RTX 50
}

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        f"co_detr is built against the PyTorch that runs it, but importing torch failed ({error}). "
        f"Install torch>=2.4 first, then: {BUILD_COMMAND}"
    ) from error


def enabled(variable: str) -> bool:
    """Whether an environment switch is set to something other than 0 or nothing."""
    return os.environ.get(variable, "") not in ("", "0")


def find_toolkit() -> str | None:
    """The first complete CUDA toolkit, or None.

    torch takes the folder above an ``nvcc`` on PATH, which is no toolkit when that is a wrapper
    script or a link.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [named] if named else [cpp_extension.CUDA_HOME, "/usr/local/cuda"]
    for home in (Path(candidate) for candidate in candidates if candidate):
        headers = [home / "include", *home.glob("targets/*/include")]
        if (home / "bin" / "nvcc").exists() and any(
            (folder / "cuda_runtime_api.h").exists() for folder in headers
        ):
            return str(home)
    return None


def wants_cuda(toolkit: str | None) -> bool:
    """CUDA kernels need a toolkit and a PyTorch built with CUDA, but no GPU."""
    if enabled("CO_DETR_NO_CUDA"):
        return False
    found = toolkit is not None and torch.version.cuda is not None
    if enabled("FORCE_CUDA") and not found:
        raise SystemExit(
            f"FORCE_CUDA=1 needs a CUDA toolkit with bin/nvcc and its headers (found: {toolkit}) "
            f"and a PyTorch with CUDA (torch {torch.__version__} has: {torch.version.cuda}); set "
            "CUDA_HOME, install another torch, or leave FORCE_CUDA out."
        )
    return found


def toolkit_version(toolkit: str) -> tuple[int, int]:
    """Major and minor version that ``nvcc --version`` prints."""
    command = [str(Path(toolkit) / "bin" / "nvcc"), "--version"]
    printed = subprocess.run(command, capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", printed)
    if release is None:
        raise SystemExit(
            f"{' '.join(command)} names no release (it printed {printed!r}); set CUDA_HOME to a "
            "CUDA toolkit, or CO_DETR_NO_CUDA=1 to build the CPU kernels only."
        )
    return int(release[1]), int(release[2])


def default_architectures(toolkit: tuple[int, int], of_torch: tuple[int, int]) -> str:
    """What to compile for when nobody said so and no GPU can be asked.

    ``of_torch``: the CUDA version that torch was built with. It refuses names that are newer.
    """
    known = min(toolkit, of_torch)
    names = [name for since, group in ARCHITECTURES.items() if since <= known for name in group]
    return ";".join(names) + "+PTX"


def is_stable() -> bool:
    """Whether this PyTorch has the stable interface."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= STABLE_SINCE


def extension() -> "cpp_extension.CppExtension":
    """The ``co_detr._C`` library; see the module docstring for its switches."""
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
    flags.append("-fopenmp-simd")  # its vectors; the threads are PyTorch's
    flags.append("-fno-wrapv")  # Python's own flags have it, which costs the forward pass a fifth
    macros, linked = [], []
    if is_stable():
        major, minor = STABLE_SINCE
        macros.append(f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}")
    elif platform.system() != "Darwin":
        # at::parallel_for is header code: without -fopenmp here it silently runs on one thread.
        flags.append("-fopenmp")
        linked.append("-fopenmp")
    sources = [f"{KERNELS}{part}.cpp" for part in ("", "_cpu", "_cpu_forward", "_cpu_backward")]
    kind = cpp_extension.CppExtension
    toolkit = find_toolkit()
    if wants_cuda(toolkit):
        cpp_extension.CUDA_HOME = toolkit
        if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
            of_torch = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
            os.environ["TORCH_CUDA_ARCH_LIST"] = default_architectures(
                toolkit_version(toolkit), of_torch
            )
        kind = cpp_extension.CUDAExtension
        sources += [f"{KERNELS}_cuda.cpp"]
        sources += [
            f"{KERNELS}_cuda_{name}.cu" for name in ("forward", "backward", "deterministic")
        ]
        macros.append("-DUSE_CUDA")
    with_cuda = kind is cpp_extension.CUDAExtension
    print(f"co_detr: building kernels for CPU{' and CUDA' if with_cuda else ' only'}")
    return kind(
        "co_detr._C",
        sources,
        depends=[
            f"{KERNELS}_{name}.h"
            for name in ("common", "cpu", "cuda", "cuda_device", "plan", "simd", "torch", "types")
        ],
        extra_compile_args={
            "cxx": [*flags, *macros],
            "nvcc": ["-O3", "--threads=0", *macros],  # the architectures in parallel
        },
        extra_link_args=linked,
        py_limited_api=is_stable(),
    )


class Build(cpp_extension.BuildExtension):
    """BuildExtension whose failure ends in one sentence that says what to do."""

    def build_extensions(self) -> None:
        if self.inplace:  # Python would prefer a library that an earlier version built for it alone
            for outdated in (ROOT / "co_detr").glob("_C.*"):
                outdated.unlink()
        try:
            super().build_extensions()
        except Exception as error:
            sys.stdout.flush()
            raise SystemExit(
                f"\nco_detr: building the MSDeformAttn kernels failed ({error}); the compiler's "
                "message is above. They need a C++ compiler (g++) and ninja, and for CUDA a "
                f"toolkit of torch's major version (torch has CUDA {torch.version.cuda}). "
                "CO_DETR_NO_CUDA=1 builds the CPU kernels only, CO_DETR_NO_EXT=1 none (slow "
                f"reference). Then again: {BUILD_COMMAND}"
            ) from error


def version() -> str:
    for line in (ROOT / "co_detr" / "__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise SystemExit("co_detr/__init__.py has no __version__ line")


def requirements(name: str) -> list[str]:
    """The lines of a requirements file of this folder."""
    lines = (ROOT / name).read_text().splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]


def config_packages() -> dict[str, str]:
    """The folders of configs as packages below co_detr -> where they lie; see co_detr.model_zoo."""
    folders = sorted({path.parent.relative_to(ROOT) for path in ROOT.glob("configs/**/*.py")})
    return {f"co_detr.{'.'.join(folder.parts)}": str(folder) for folder in folders}


setup(
    name="co_detr",
    version=version(),
    description="Co-DETR: DETR detectors with collaborative hybrid assignments, on Detectron2",
    license="Apache-2.0",
    packages=[*find_packages(include=["co_detr", "co_detr.*"]), *config_packages()],
    package_dir=config_packages(),
    entry_points={"console_scripts": ["co-detr = co_detr.command_line:main"]},
    package_data={
        "co_detr.tools": ["detectron2.txt"],
        "co_detr.tools.analyze": ["templates/*"],
        "co_detr.tools.demo": ["static/*", "templates/*"],
    },
    python_requires=">=3.10",
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if is_stable() else {},
    # Detectron2 is left out on purpose: an installed one is kept, whatever its distribution's name.
    install_requires=[
        "torch>=2.10" if is_stable() and not enabled("CO_DETR_NO_EXT") else "torch>=2.4",
        "torchvision",
        *requirements("requirements.txt"),
    ],
    extras_require={
        **{
            name: requirements(f"requirements-{name}.txt")
            for name in ("demo", "docs", "export", "quickstart", "timm", "video")
        },
        "supervision": ["supervision>=0.31"],
        # These need nothing more. They are here for who expects to have to ask for them.
        "lvis": [],
        "masks": [],
    },
    ext_modules=[] if enabled("CO_DETR_NO_EXT") else [extension()],
    cmdclass={"build_ext": Build.with_options(use_ninja=True)},
    zip_safe=False,
)
