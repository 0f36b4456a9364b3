"""Runs the contestants of one case and lays their times out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import Contestant, Timing, format_ms, interleave, markdown_table, ratio
from co_detr.layers.deformable_attention import ms_deform_attn

from .cases import CASES, DTYPES, Inputs
from .contestants import EAGER, ORIGINAL, Attention
from .gate import exact_results, fault

PASSES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Effort:
    """How long to measure, and where."""

    rounds: int
    seconds: float
    device: str
    flush: bool = True

    def interleave(self, contestants: dict[str, Contestant]) -> dict[str, Timing]:
        on_gpu = self.device == "cuda"
        return interleave(
            contestants,
            self.rounds,
            seconds_per_round=self.seconds,
            warm_up=20 if on_gpu else 2,
            device=self.device,
            before_call=_cache_flush() if on_gpu and self.flush else None,
        )


@dataclass(frozen=True)
class CaseResult:
    """Times by pass and contestant; contestants that failed the gate have a fault instead."""

    case: str
    spread: str
    dtype: str
    timings: dict[str, dict[str, Timing]]
    faults: dict[str, str]
    bound_seconds: dict[str, float]  # by pass: least bytes over copy bandwidth

    @property
    def title(self) -> str:
        return f"{self.case}, {self.spread}, {self.dtype}"

    def ratios(self, baseline: str) -> dict[str, dict[str, float]]:
        """Pass -> contestant -> how many times faster than ``baseline``; empty without it."""
        return {
            name: {other: ratio(times[baseline], timing) for other, timing in times.items()}
            for name, times in self.timings.items()
            if baseline in times
        }

    def table(self) -> str:
        """Milliseconds (quartiles), ratios to the baselines present, and % of the bound."""
        baselines = [
            (baseline, f"x {label}")
            for baseline, label in ((EAGER, "eager"), (ORIGINAL, "original"))
            if self.ratios(baseline)
        ]
        headers = ["contestant"]
        for name in PASSES:
            headers += [f"{name} ms", *(label for _, label in baselines), "% of bound"]
        rows = []
        for contestant in self.timings[PASSES[0]]:
            row = [contestant]
            for name in PASSES:
                timing = self.timings[name][contestant]
                row.append(format_ms(timing))
                row += [
                    f"{self.ratios(baseline)[name][contestant]:.1f}" for baseline, _ in baselines
                ]
                row.append(f"{100 * self.bound_seconds[name] / timing.median:.1f}")
            rows.append(row)
        return markdown_table(headers, rows)

    def as_dict(self) -> dict[str, object]:
        return {
            "case": self.case,
            "spread": self.spread,
            "dtype": self.dtype,
            "bound_s": self.bound_seconds,
            "failed": self.faults,
            "timings": {
                name: {who: timing.as_dict() for who, timing in times.items()}
                for name, times in self.timings.items()
            },
            "times_faster_than_eager": self.ratios(EAGER),
            "times_faster_than_original": self.ratios(ORIGINAL),
        }


def run_case(
    case: str,
    spread: str,
    dtype: str,
    contestants: dict[str, Attention],
    bandwidth: float,
    effort: Effort,
) -> CaseResult:
    """Checks all contestants on one case and times those that are right."""
    inputs = CASES[case].inputs(spread, DTYPES[dtype], effort.device)
    exact = exact_results(inputs)
    faults = {name: fault(attend, inputs, exact) for name, attend in contestants.items()}
    del exact
    right = {name: attend for name, attend in contestants.items() if faults[name] is None}
    return CaseResult(
        case=case,
        spread=spread,
        dtype=dtype,
        timings={
            name: effort.interleave(
                {who: _passes(attend, inputs)[name] for who, attend in right.items()}
            )
            for name in PASSES
        },
        faults={name: reason for name, reason in faults.items() if reason is not None},
        bound_seconds={
            name: count / bandwidth
            for name, count in CASES[case].least_bytes(DTYPES[dtype]).items()
        },
    )


def compare_threads(case: str, threads: Sequence[int], effort: Effort) -> dict[str, object]:
    """Prints and returns how much faster ours gets with more threads, in interleaved rounds."""
    inputs = CASES[case].inputs("2px", torch.float32, effort.device)
    before = torch.get_num_threads()

    def with_threads(count: int, contestant: Contestant) -> Contestant:
        def prepare() -> tuple:
            torch.set_num_threads(count)
            return contestant.prepare()

        return Contestant(contestant.run, prepare)

    passes = _passes(_ours, inputs)
    timings = {
        name: effort.interleave(
            {str(count): with_threads(count, passes[name]) for count in threads}
        )
        for name in PASSES
    }
    torch.set_num_threads(before)
    return _compare(f"{case}, 2px, fp32: threads", timings, str(threads[0]))


def compare_builds(case: str, native, effort: Effort) -> dict[str, object]:
    """Prints and returns the portable and the native build's times, operator by operator."""
    inputs = CASES[case].inputs("2px", torch.float32, effort.device)
    value, locations, weights = (leaf.detach() for leaf in inputs.leaves)
    shapes = [size for shape in inputs.level_shapes for size in shape]
    builds = {"portable": torch.ops.co_detr, "native": native}

    def forward(operators) -> Callable[[], Tensor]:
        return lambda: operators.ms_deform_attn(value, shapes, locations, weights)

    def backward(operators) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: operators.ms_deform_attn_backward(
            inputs.grad_output, value, shapes, locations, weights, False
        )

    timings = {
        name: effort.interleave(
            {build: Contestant(make(operators)) for build, operators in builds.items()}
        )
        for name, make in (("forward", forward), ("backward", backward))
    }
    return _compare(f"{case}, 2px, fp32: builds", timings, "portable")


def _compare(title: str, timings: dict[str, dict[str, Timing]], baseline: str) -> dict[str, object]:
    ratios = {
        name: {who: ratio(times[baseline], timing) for who, timing in times.items()}
        for name, times in timings.items()
    }
    rows = [
        [name, who, format_ms(timing), f"{ratios[name][who]:.2f}"]
        for name, times in timings.items()
        for who, timing in times.items()
    ]
    table = markdown_table(["pass", "ours", "ms", f"times faster than {baseline}"], rows)
    print(f"\n### {title}\n\n{table}\n", flush=True)
    return {
        "title": title,
        "times_faster": ratios,
        "timings": {
            name: {who: timing.as_dict() for who, timing in times.items()}
            for name, times in timings.items()
        },
    }


def _ours(inputs: Inputs) -> Tensor:
    return ms_deform_attn(inputs.value, inputs.level_shapes, inputs.locations, inputs.weights)


def _passes(attend: Attention, inputs: Inputs) -> dict[str, Contestant]:
    """What to time for each pass. Backward gets a fresh graph, whose making does not count."""

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(inputs)

    def backward(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, inputs.leaves, inputs.grad_output)

    return {
        "forward": Contestant(forward),
        "backward": Contestant(backward, lambda: (attend(inputs),)),
        "forward+backward": Contestant(lambda: backward(attend(inputs))),
    }


def _cache_flush() -> Callable[[], Tensor]:
    buffer = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # larger than any L2
    return buffer.zero_
