"""A second build of our CPU kernels for this processor alone, to compare the portable one with."""

import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "co_detr" / "layers" / "csrc"
NAMESPACE = "co_detr_native"
# Those of setup.py, and one version of each kernel with all that this processor has.
FLAGS = [
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
    "-fopenmp",
    "-march=native",
    "-DCO_DETR_ONE_VERSION",
]


def load_native_operators(folder: Path):
    """Builds the kernels in ``folder`` and loads them as operators of their own namespace."""
    sources = []
    for source in SOURCES.iterdir():
        if "cuda" in source.name:
            continue
        copy = folder / source.name
        copy.write_text(source.read_text().replace("co_detr", NAMESPACE))
        if copy.suffix == ".cpp":
            sources.append(str(copy))
    cpp_extension.load(
        NAMESPACE,
        sorted(sources),
        extra_cflags=FLAGS,
        extra_ldflags=["-fopenmp"],
        build_directory=str(folder),
        is_python_module=False,
    )
    return getattr(torch.ops, NAMESPACE)


def native_target() -> str:
    """What the compiler takes this processor for."""
    listing = subprocess.run(
        ("g++", "-march=native", "-Q", "--help=target"), capture_output=True, text=True, check=True
    ).stdout
    for line in listing.splitlines():
        words = line.split()
        if words[:1] == ["-march="] and len(words) > 1:
            return words[1]
    return "unknown"
