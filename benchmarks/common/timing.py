"""Times contestants in turn, reshuffled each round, so that a slow minute hits all of them."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Contestant:
    """Something to time: ``run(*prepare())``, of which only ``run`` counts."""

    run: Callable[..., object]
    prepare: Callable[[], tuple] = tuple


@dataclass
class Timing:
    """Seconds of every call, round by round."""

    rounds: list[list[float]] = field(default_factory=list)

    @property
    def calls(self) -> list[float]:
        return [seconds for calls in self.rounds for seconds in calls]

    @property
    def median(self) -> float:
        return statistics.median(self.calls)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile: half of the calls took between the two."""
        if len(self.calls) < 2:
            return self.median, self.median
        first, _, third = statistics.quantiles(self.calls, n=4, method="inclusive")
        return first, third

    def as_dict(self) -> dict[str, object]:
        return {
            "median_s": self.median,
            "quartiles_s": list(self.quartiles),
            "round_medians_s": [statistics.median(calls) for calls in self.rounds],
            "calls": len(self.calls),
        }


def ratio(baseline: Timing, timing: Timing) -> float:
    """How many times faster ``timing`` is: the median over rounds of the ratio within a round."""
    return statistics.median(
        statistics.median(theirs) / statistics.median(ours)
        for theirs, ours in zip(baseline.rounds, timing.rounds, strict=True)
    )


def interleave(
    contestants: Mapping[str, Contestant | Callable[[], object]],
    rounds: int,
    *,
    seconds_per_round: float = 0.0,
    max_calls: int = 200,
    warm_up: int = 1,
    device: str = "cpu",
    before_call: Callable[[], object] | None = None,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time all contestants ``rounds`` times, in a new random order each round.

    Args:
        contestants: name -> what to time.
        rounds: how often each contestant has its turn.
        seconds_per_round: a turn is as many calls as fit in this time, at least one.
        max_calls: at most so many calls in a turn.
        warm_up: calls of each contestant before the first round, not timed.
        device: ``"cuda"`` times with CUDA events, anything else with the clock.
        before_call: untimed, before each call; for example to flush a cache.
        seed: of the orders.
    """
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    entries = {
        name: entry if isinstance(entry, Contestant) else Contestant(entry)
        for name, entry in contestants.items()
    }

    def one_call(contestant: Contestant) -> float:
        arguments = contestant.prepare()
        if before_call is not None:
            before_call()
        return clock(contestant.run, arguments)

    calls = {}
    for name, contestant in entries.items():
        for _ in range(warm_up):
            one_call(contestant)
        seconds = one_call(contestant) if seconds_per_round else 0.0
        fitting = int(seconds_per_round / seconds) if seconds else 1
        calls[name] = min(max(fitting, 1), max_calls)

    timings = {name: Timing() for name in entries}
    order, shuffler = list(entries), random.Random(seed)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            timings[name].rounds.append([one_call(entries[name]) for _ in range(calls[name])])
    return timings


def _cpu_seconds(run: Callable[..., object], arguments: tuple) -> float:
    start = time.perf_counter()
    result = run(*arguments)  # kept until the clock has stopped: freeing is not part of the call
    seconds = time.perf_counter() - start
    del result
    return seconds


def _cuda_seconds(run: Callable[..., object], arguments: tuple) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run(*arguments)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
