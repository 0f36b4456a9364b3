"""The stages of `check_gpu.sh`: what runs, for how long at most, and which figures count."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

PYTHON = sys.executable
CORES = os.cpu_count() or 1
ENCODER = "enc-800x1333-B2"  # the case of benchmarks/attention/cases.py that the table shows
FIGURES = "figures: "  # before the JSON of what a script wants in the table
Figures = dict[str, object]


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: in the table, and before its part of the log.
        command: what runs; None: nothing, and ``note`` says why.
        limit: seconds after which it is ended.
        group: stages of one group run at the same time, groups one after the other.
        environment: variables on top of the present ones.
        figures: reads what the table shows from the output.
        note: for the table.
    """

    name: str
    command: Sequence[str] | None
    limit: int
    group: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    figures: Callable[[str], Figures] = lambda output: _printed_figures(output)
    note: str = ""


def gpu_stages(out: Path, data: str | None) -> list[Stage]:
    """On a machine with a GPU. What is timed runs alone."""
    parallel = _spread_over(8)
    training = [f"--data={data}"] if data else []
    sanitizer = shutil.which("compute-sanitizer")
    return [
        Stage(
            "environment",
            ["bash", "-c", f"nvidia-smi && {PYTHON} -m co_detr.tools.collect_env"],
            limit=60,
            figures=_environment,
        ),
        Stage(
            "build",
            [
                *("bash", "-ec"),
                f"{PYTHON} setup.py build_ext --inplace; {PYTHON} -c '{_HAS_CUDA}'; "
                f"{PYTHON} -m co_detr.tools.collect_env",
            ],
            limit=180,
            group=1,
            environment={
                "FORCE_CUDA": "1",
                "TORCH_CUDA_ARCH_LIST": _architecture(),
                "MAX_JOBS": str(CORES),
            },
            figures=_built,
        ),
        Stage(
            "tests-gpu",
            [*_pytest(out, "gpu"), "-m", "gpu", *parallel],
            limit=150,
            group=2,
            figures=_tests,
        ),
        Stage(
            "tests-core",
            [*_pytest(out, "core"), "-m", "not gpu", *_CORE_TESTS, *parallel],
            limit=170,
            group=2,
            environment={"TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "1"},
            figures=_tests,
        ),
        Stage(
            "waits",
            [PYTHON, "-m", "scripts.gpu.step_report", "waits", "--device", "cuda"],
            limit=60,
            group=2,
        ),
        Stage(
            "training",
            [PYTHON, "scripts/gpu/short_training.py", "--device", "cuda", *training],
            limit=150,
            group=2,
        ),
        *(
            Stage(
                tool,
                None
                if sanitizer is None
                else [
                    *(sanitizer, "--tool", tool, "--report-api-errors", "no"),
                    *("--error-exitcode", "9", "--print-limit", "20"),
                    *(PYTHON, "-m", "scripts.gpu.kernel_cases", "--device", "cuda"),
                ],
                limit=150,
                group=2,
                # Blocks of PyTorch's cache hide what is written behind a tensor.
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                note="compute-sanitizer is not on the PATH" if sanitizer is None else "",
            )
            for tool in ("memcheck", "racecheck")
        ),
        Stage(
            "operator",
            [
                *(PYTHON, "-m", "benchmarks.ms_deform_attn", "--device", "cuda"),
                *("--spreads", "2px"),
                *("--rounds", "5", "--seconds", "0.06", "--output", str(out / _OPERATOR)),
                *("--contestants", *_CONTESTANTS),
            ],
            limit=90,
            group=3,
            figures=lambda output: operator_figures(out / _OPERATOR, ENCODER),
        ),
        Stage(
            "step",
            [
                *(PYTHON, "-m", "benchmarks.train_step", "--device", "cuda", "--together"),
                *("--contestants", "k0", "k1", "k2", "--precisions", "tf32", "bf16"),
                *("--rounds", "3", "--steps", "4", "--warm-up", "2", "--with-optimizer"),
                *("--threads", "8", "--output", str(out / _STEP)),
            ],
            limit=120,
            group=4,
            figures=lambda output: step_figures(out / _STEP),
        ),
        Stage(
            "profile",
            [
                *(PYTHON, "-m", "scripts.gpu.step_report", "profile", "--device", "cuda"),
                *("--output", str(out / "profile.txt")),
            ],
            limit=45,
            group=5,
        ),
    ]


def rehearsal_stages(out: Path, data: str | None) -> list[Stage]:
    """The same on the CPU, as small as possible: that every stage starts, and ends well."""
    one_case = "dec-300-640x896-B1"
    training = [f"--data={data}"] if data else []
    emulated = {"TEST_DEVICE": "emulated", "OMP_NUM_THREADS": "1"}
    return [
        Stage("environment", [PYTHON, "-m", "co_detr.tools.collect_env"], 60, figures=_environment),
        Stage("build", [PYTHON, "setup.py", "--version"], 60, 1, note="the arguments alone"),
        Stage(
            "tests-gpu",
            [*_pytest(out, "gpu"), "-m", "gpu", "tests/gpu", "tests/layers"],
            limit=180,
            group=2,
            environment=emulated,
            figures=_tests,
            note="what needs no card, on an emulated device",
        ),
        Stage(
            "tests-core",
            [*_pytest(out, "core"), "-m", "not gpu", *_REHEARSED_TESTS],
            limit=240,
            group=3,
            environment=emulated,
            figures=_tests,
            note="on an emulated device",
        ),
        Stage(
            "waits",
            [PYTHON, "-m", "scripts.gpu.step_report", "waits", "--device", "cpu", "--tiny"],
            limit=120,
            group=4,
        ),
        Stage(
            "training",
            [
                *(PYTHON, "scripts/gpu/short_training.py", "--device", "cpu"),
                *("--steps", "6", "--images", "8", *training),
            ],
            limit=180,
            group=5,
        ),
        Stage(
            "memcheck",
            [PYTHON, "-m", "scripts.gpu.kernel_cases", "--device", "cpu"],
            limit=120,
            group=6,
            note="its program, on the CPU",
        ),
        Stage("racecheck", None, 0, 6, note="as memcheck"),
        Stage(
            "operator",
            [
                *(PYTHON, "-m", "benchmarks.ms_deform_attn"),
                *("--spreads", "2px", "--dtypes", "fp32"),
                *("--cases", one_case, "--rounds", "1", "--seconds", "0.01"),
                *("--contestants", *_CONTESTANTS, "--output", str(out / _OPERATOR)),
            ],
            limit=120,
            group=7,
            figures=lambda output: operator_figures(out / _OPERATOR, one_case),
        ),
        Stage(
            "step",
            [
                *(PYTHON, "-m", "benchmarks.train_step", "--together", "--quick"),
                *("--contestants", "k0", "k2", "--mode", "train", "--precisions", "tf32"),
                *("--warm-up", "0", "--with-optimizer", "--allocator", "default"),
                *("--output", str(out / _STEP)),
            ],
            limit=180,
            group=8,
            figures=lambda output: step_figures(out / _STEP),
        ),
        Stage(
            "profile",
            [
                *(PYTHON, "-m", "scripts.gpu.step_report", "profile", "--device", "cpu", "--tiny"),
                *("--output", str(out / "profile.txt")),
            ],
            limit=120,
            group=9,
        ),
    ]


# All but the compiled reference, which takes most of a minute to compile for each case.
_CONTESTANTS = [
    *("ours", "reference eager", "MultiScaleDeformableAttention", "mmcv", "deformops"),
    "msda_triton",
]
_OPERATOR = "ms_deform_attn.json"
_STEP = "train_step.json"
_CORE_TESTS = [f"tests/{folder}" for folder in ("layers", "modeling", "engine", "prediction")]
_REHEARSED_TESTS = [
    "tests/modeling/test_edge_batches.py::test_ordinary_batch",
    "tests/modeling/test_matching.py",
    "tests/engine/test_trainer.py::test_accumulation_equals_one_large_batch",
]
_HAS_CUDA = (
    "from co_detr.layers.deformable_attention import KERNEL_DEVICES as found; print(found); "
    'assert "cuda" in found'
)


def _pytest(out: Path, name: str) -> list[str]:
    """pytest, with a limit for each test where the plugin for it is installed."""
    limit = ["--timeout=100"] if find_spec("pytest_timeout") else []
    options = ["-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "--durations=5"]
    return [PYTHON, "-m", "pytest", *options, *limit, f"--junitxml={out / f'tests_{name}.xml'}"]


def _spread_over(processes: int) -> list[str]:
    """Arguments for several processes, where the plugin for it is installed."""
    many = find_spec("xdist") and CORES >= 4
    return ["-n", str(min(processes, CORES // 2))] if many else []


def _architecture() -> str:
    """Compute capability of the first card, such as "9.0"; 8.0 where it cannot be asked."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    found = re.match(r"\s*(\d+\.\d)", answer)
    return found[1] if found else "8.0"


def _printed_figures(output: str) -> Figures:
    lines = [line for line in output.splitlines() if line.startswith(FIGURES)]
    return json.loads(lines[-1].removeprefix(FIGURES)) if lines else {}


def _environment(output: str) -> Figures:
    """From what `co_detr.tools.collect_env` prints."""
    names = {"torch": "torch", "GPU": "CUDA devices", "kernel": "MSDeformAttn, CUDA kernel"}
    found = {
        name: re.search(rf"^{printed}  +(.*?)( from .*)?$", output, re.MULTILINE)
        for name, printed in names.items()
    }
    return {name: match[1] for name, match in found.items() if match}


def _built(output: str) -> Figures:
    return {"for": _architecture()} | _environment(output)


def _tests(output: str) -> Figures:
    """Counts of pytest's last line."""
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?|deselected)\b", output[-2000:])
    return {what: int(number) for number, what in counts}


def operator_figures(path: Path, case: str) -> Figures:
    """Milliseconds of ours in one case, and how many times faster than each other it is."""
    report = json.loads(path.read_text())
    found: Figures = {}
    for measured in report["cases"]:
        if measured["case"] != case:
            continue
        for direction in ("forward", "forward+backward"):
            times = measured["timings"][direction]
            if "ours" not in times:
                continue
            ours = times["ours"]["median_s"]
            name = f"{measured['dtype']} {direction}"
            found[f"{name} ms"] = round(1e3 * ours, 3)
            for other, timing in times.items():
                if other != "ours":
                    found[f"{name} x {other}"] = round(timing["median_s"] / ours, 2)
    faults = [f"{e['case']} {name}" for e in report["cases"] for name in e["failed"]]
    return found | ({"failed": faults} if faults else {})


def step_figures(path: Path) -> Figures:
    """Of every case and contestant: milliseconds of a step, and peak memory in GiB."""
    found: Figures = {}
    for result in json.loads(path.read_text())["results"]:
        case = result["case"]
        for contestant in result["contestants"]:
            name = f"{case['mode']} {case['precision']} {contestant['contestant']['name']}"
            seconds = statistics.median(contestant["step"]["round_medians_s"])
            peak = contestant["memory"]["peak"] / 2**30
            found[name] = f"{1e3 * seconds:.0f} ms, {peak:.1f} GiB"
    return found
