#!/usr/bin/env python3
"""Times multi-scale deformable attention: ours and every other implementation that is installed.

    python -m benchmarks.ms_deform_attn --quick             20 seconds on two CPU cores
    python -m benchmarks.ms_deform_attn --threads 1 2 --native --output results.json
    python -m benchmarks.ms_deform_attn --device cuda --output results.json

One process and one set of tensors per case; contestants have their turns in a new random order each
round. Before that each has to agree with an fp64 reference, in the output and in all gradients.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.attention.bandwidth import copy_bandwidth
from benchmarks.attention.cases import CASES, DEFAULT_CASES, DTYPES, SPREADS
from benchmarks.attention.contestants import COMPILED, find_contestants
from benchmarks.attention.native import load_native_operators, native_target
from benchmarks.attention.rounds import (
    CaseResult,
    Effort,
    compare_builds,
    compare_threads,
    run_case,
)
from benchmarks.common import environment, write_json
from co_detr.process_setup import keep_freed_memory


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.set_num_threads(max(options.threads))
    kept = not options.default_allocator and keep_freed_memory()
    wanted = options.contestants
    if wanted is None and options.quick:
        wanted = [name for name in find_contestants(options.device).present if name != COMPILED]
        print(f"Left out by --quick: {COMPILED}.")
    field = find_contestants(options.device, wanted)
    for name, reason in field.absent.items():
        print(f"Left out: {name} ({reason}).")
    bandwidth = copy_bandwidth(options.device)
    print(
        f"{environment()['cpu']}, {max(options.threads)} threads, torch {torch.__version__}; "
        f"copies {bandwidth / 1e9:.1f} GB/s; freed memory is {'kept' if kept else 'given back'}."
    )
    effort = Effort(options.rounds, options.seconds, options.device, flush=not options.warm)
    report = {
        "environment": environment() | {"freed_memory_is_kept": kept},
        "copy_bandwidth_bytes_per_s": bandwidth,
        "left_out": field.absent,
        "cases": [],
    }
    for name in options.cases:
        for spread in options.spreads:
            for dtype in options.dtypes:
                result = run_case(name, spread, dtype, field.present, bandwidth, effort)
                show(result)
                report["cases"].append(result.as_dict())
    if len(options.threads) > 1:
        report["threads"] = [
            compare_threads(name, options.threads, effort) for name in options.cases
        ]
    if options.native:
        with tempfile.TemporaryDirectory() as folder:
            operators = load_native_operators(Path(folder))
            report["native"] = {
                "target": native_target(),
                "cases": [compare_builds(name, operators, effort) for name in options.cases],
            }
    if options.output:
        write_json(options.output, report)
        print(f"Wrote {options.output}.")
    return 0


def show(result: CaseResult) -> None:
    print(f"\n### {result.title}\n\n{result.table()}\n", flush=True)
    for name, fault in result.faults.items():
        print(f"FAILED, not timed: {name}: {fault}.", flush=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 px, fp32, few rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE")
    parser.add_argument("--spreads", nargs="+", choices=SPREADS, metavar="SPREAD")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE")
    parser.add_argument("--contestants", nargs="+", metavar="NAME")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="of one contestant in one round")
    parser.add_argument(
        "--threads", type=int, nargs="+", help="several: ours is compared between them (CPU)"
    )
    parser.add_argument("--native", action="store_true", help="compare with -march=native (CPU)")
    parser.add_argument("--warm", action="store_true", help="do not flush the GPU's L2 cache")
    parser.add_argument(
        "--default-allocator", action="store_true", help="freed memory goes back to the system"
    )
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args(arguments)
    options.cases = options.cases or DEFAULT_CASES[options.device]
    options.spreads = options.spreads or (["2px"] if options.quick else list(SPREADS))
    options.dtypes = options.dtypes or (["fp32"] if options.quick else list(DTYPES))
    options.rounds = options.rounds or (3 if options.quick else 7)
    options.seconds = options.seconds or (0.1 if options.quick else 0.5)
    options.threads = options.threads or [torch.get_num_threads()]
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use")
    if options.device == "cuda" and (options.native or len(options.threads) > 1):
        parser.error("--native and several --threads compare CPU kernels: use --device cpu")
    return options


if __name__ == "__main__":
    sys.exit(main())
