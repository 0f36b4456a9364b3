"""Compiles the CUDA kernels for the CPU and makes them an operator, :func:`build`.

The sources are taken as they are, headers, host code and operator schemas included. Only what a
C++ compiler cannot read is translated, text by text: launches (``<<< >>>``), and PTX, whose
instructions are turned into C++ one by one. ``shim/`` stands in for the headers of CUDA and Python,
and ``lockstep.cpp`` for the GPU.
"""

import contextlib
import ctypes
import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
SOURCES = Path(__file__).parents[3] / "co_detr" / "layers" / "csrc"
LIBRARY = "co_detr_lockstep"  # the operators' namespace in torch.ops

FLAGS = ["-std=c++20", "-fPIC", "-w", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"]
# Sanitizers, without their libraries: lockstep.cpp has what the compiler calls.
DEVICE_FLAGS = ("-O1", "-fsanitize=thread,alignment")


@dataclass(frozen=True)
class Unit:
    """What is compiled at once.

    ``defines``: macros for the sources alone. ``replaced``: text -> other text; each has to be
    there once.
    """

    name: str
    sources: tuple[Path, ...]
    flags: tuple[str, ...]
    defines: tuple[tuple[str, str], ...] = ()
    replaced: tuple[tuple[str, str], ...] = ()


def device_unit(
    name: str, source: Path, architecture: int = 800, *defines: tuple[str, str]
) -> Unit:
    compiler = {
        "__CUDA_ARCH__": str(architecture),
        "__CUDACC_VER_MAJOR__": "13",
        "__CUDACC_VER_MINOR__": "0",
    }
    return Unit(name, (source,), DEVICE_FLAGS, (*compiler.items(), *defines))


UNITS = (  # the slowest first
    Unit(
        "host",
        (SOURCES / "ms_deform_attn_cuda.cpp", SOURCES / "ms_deform_attn.cpp"),
        ("-O0",),
        replaced=(
            # Beside the real operators, and for the tensors that there are.
            ("CO_DETR_LIBRARY_IMPL(co_detr, CUDA, m)", f"CO_DETR_LIBRARY_IMPL({LIBRARY}, CPU, m)"),
            ("CO_DETR_LIBRARY(co_detr, m)", f"CO_DETR_LIBRARY({LIBRARY}, m)"),
            # So that problems of the tests' size, too, take the heads in turns.
            ("listed_points = int64_t{1} << 22", "listed_points = 4000"),
        ),
    ),
    *(
        device_unit(
            f"backward_{architecture}",
            SOURCES / "ms_deform_attn_cuda_backward.cu",
            architecture,
            ("launch_backward", f"launch_backward_{architecture}"),
            # GCC lets templates of this template be shared, though its namespace is anonymous.
            ("Backward", f"Backward_{architecture}"),
        )
        for architecture in (800, 900)
    ),
    device_unit("forward", SOURCES / "ms_deform_attn_cuda_forward.cu"),
    device_unit("deterministic", SOURCES / "ms_deform_attn_cuda_deterministic.cu"),
    device_unit("faults", HERE / "faults.cu"),
    Unit("lockstep", (HERE / "lockstep.cpp",), ("-O2",)),
    Unit("backward", (HERE / "backward.cpp",), ("-O0",)),
)


class TranslationError(Exception):
    """The kernels use something that has no counterpart here yet."""


def translate(text: str) -> str:
    """A CUDA source as C++; every line keeps its number."""
    text = re.sub(r"asm volatile\(.*?\);", translate_assembly, text, flags=re.DOTALL)
    text = re.sub(r"(\w+)(<[\w, ]+>)?<<<(.*?)>>>\(", r'lockstep::on_grid("\1", \1\2, \3)(', text)
    leftover = re.search(r"\basm\b|<<<|\b__shared__\b|\b__syncthreads\b", text)
    if leftover:
        raise TranslationError(f"{leftover.group()} is used in a way that is not translated")
    return text


def translate_assembly(match: re.Match[str]) -> str:
    """``asm volatile("PTX" :: operands : "memory");`` as a block of C++."""
    parts = re.fullmatch(
        r'asm volatile\((.*?)::(.*?):\s*"memory"\);', match.group(), flags=re.DOTALL
    )
    if parts is None:
        raise TranslationError(f"assembly with results is not translated: {match.group()}")
    code, operands = parts.groups()
    ptx = "".join(re.findall(r'"(.*?)"', code)).replace("\\n", " ")
    lines = [
        f"const auto ptx_{number} = {expression};"
        for number, expression in enumerate(split_operands(operands))
    ]
    inner = re.fullmatch(r"\s*\{(.*)\}\s*", ptx)
    # A label ends in a colon, an instruction in a semicolon.
    statements = re.findall(r"\s*([^;:]+[;:])", inner.group(1) if inner else ptx)
    lines += [translate_instruction(statement.strip()) for statement in statements]
    return "{ " + " ".join(lines) + ";}" + "\n" * match.group().count("\n")


def split_operands(text: str) -> list[str]:
    """The expressions in ``"f"(a * b), "l"(c(d))``."""
    expressions, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character == "(":
            start = i if depth == 0 else start
            depth += 1
        elif character == ")":
            depth -= 1
            if depth == 0:
                expressions.append(text[start : i + 1])
    return expressions


PTX = (
    (r"\.reg \.pred (\w+);", r"bool \1;"),
    (r"setp\.ne\.s32 (\w+), %(\d+), 0;", r"\1 = ptx_\2 != 0;"),
    (r"@!(\w+) bra (\w+);", r"if (!\1) goto \2;"),
    (
        r"red\.global\.add\.v4\.f32 \[%(\d+)\], \{%(\d+), %(\d+), %(\d+), %(\d+)\};",
        r"{ const float four[] = {ptx_\2, ptx_\3, ptx_\4, ptx_\5};"
        r" lockstep::add(reinterpret_cast<float*>(ptx_\1), four, 4); }",
    ),
    (r"(\w+):", r"\1:"),
)


def translate_instruction(statement: str) -> str:
    for pattern, replacement in PTX:
        if re.fullmatch(pattern, statement):
            return re.sub(pattern, replacement, statement)
    raise TranslationError(f"no translation for the PTX instruction {statement!r}")


def write_unit(unit: Unit, folder: Path) -> Path:
    """The file that the compiler gets."""
    parts = ['#include "prelude.h"', *(f"#define {name} {text}" for name, text in unit.defines)]
    for source in unit.sources:
        text = source.read_text()
        parts.append(f'#line 1 "{source}"')
        parts.append(translate(text) if source.suffix == ".cu" else text)
    whole = "\n".join(parts)
    for old, new in unit.replaced:
        if whole.count(old) != 1:
            raise TranslationError(
                f"{unit.name}: {old!r} occurs {whole.count(old)} times, not once"
            )
        whole = whole.replace(old, new)
    path = folder / f"{unit.name}.cpp"
    path.write_text(whole)
    return path


def build(folder: Path, compiler: str) -> Path:
    """Compiles all units in ``folder``, in parallel, and links them; returns the library.

    A library that was built there of the same sources, by the same compiler, is used again.

    Raises:
        TranslationError: the sources use CUDA that is not known here.
        subprocess.CalledProcessError: the compiler failed; its message went to stderr.
    """
    of_torch = Path(torch.__file__).parent
    includes = [HERE / "shim", HERE, SOURCES, of_torch / "include"]
    flags = [*FLAGS, *(f"-I{path}" for path in includes)]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")

    def compile_unit(unit: Unit) -> str:
        source = folder / f"{unit.name}.cpp"
        output = str(source.with_suffix(".o"))
        command = [compiler, *flags, *unit.flags, "-c", str(source), "-o", output]
        subprocess.run(command, check=True)
        return output

    written = [write_unit(unit, folder) for unit in UNITS]
    libraries = [f"-L{of_torch / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,--no-undefined"]
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True)
    made_of = [version.stdout, torch.__version__, *flags, *libraries, repr(UNITS)]
    headers = sorted(path for path in (*HERE.rglob("*.h"), *SOURCES.glob("*.h")))
    made_of += [path.read_text() for path in (*written, *headers, HERE / "lockstep.cpp")]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()
    library = folder / f"liblockstep_{digest[:16]}.so"
    if library.exists():
        return library
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_unit, UNITS))
    for outdated in folder.glob("liblockstep_*.so"):
        outdated.unlink()
    whole = library.with_suffix(".incomplete")
    subprocess.run([compiler, "-shared", *objects, *libraries, "-o", str(whole)], check=True)
    return whole.rename(library)


class Device:
    """The GPU that the CPU pretends to be; one for a process."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.lockstep_commit.restype = ctypes.c_char_p
        self.operators = getattr(torch.ops, LIBRARY)

    @contextlib.contextmanager
    def memory(self) -> Iterator[None]:
        """Tensors made inside lie where kernels may touch them: all that a kernel gets has to."""
        self.library.lockstep_use_device_memory(True)
        try:
            yield
        finally:
            self.library.lockstep_use_device_memory(False)

    @contextlib.contextmanager
    def grid_limit(self, kernel: str, x: int = 2**31 - 1, y: int = 65535) -> Iterator[None]:
        """Launches ``kernel`` with at most this many blocks, which have to share out the work."""
        self.library.lockstep_limit_grid(kernel.encode(), x, y)
        try:
            yield
        finally:
            self.library.lockstep_lift_limits()

    @contextlib.contextmanager
    def capability(self, major: int) -> Iterator[None]:
        """Compute capability whose backward kernels run inside; 8 otherwise."""
        self.library.lockstep_set_capability(major)
        try:
            yield
        finally:
            self.library.lockstep_set_capability(8)

    def attention(
        self,
        value: Tensor,
        level_shapes: list[tuple[int, int]],
        sampling_locations: Tensor,
        attention_weights: Tensor,
    ) -> Tensor:
        """As :func:`co_detr.layers.ms_deform_attn`, differentiable once."""
        flat = [size for shape in level_shapes for size in shape]
        return _Attention.apply(self, value, flat, sampling_locations, attention_weights)

    def additions(self, count: int) -> int:
        """How often kernels added ``count`` numbers at once to memory, so far."""
        return self.library.lockstep_additions(count)

    def commit(self, fault: int, numbers: Tensor, output: Tensor) -> str:
        """Launches the kernel of faults.cu that has this fault; what was noticed."""
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (numbers, output))
        return self.library.lockstep_commit(fault, *pointers).decode()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, device, value, level_shapes, locations, weights):
        ctx.device, ctx.level_shapes = device, level_shapes
        ctx.save_for_backward(value, locations, weights)
        return device.operators.ms_deform_attn(value, level_shapes, locations, weights)

    @staticmethod
    def backward(ctx, grad_output):
        value, locations, weights = ctx.saved_tensors
        grads = ctx.device.operators.ms_deform_attn_backward(
            *(grad_output, value, ctx.level_shapes, locations, weights),
            torch.are_deterministic_algorithms_enabled(),
        )
        return None, grads[0], None, grads[1], grads[2]
