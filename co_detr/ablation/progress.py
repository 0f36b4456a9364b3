"""The bar over all runs, and the line of each that has ended."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm

from co_detr.ablation.run import RunState


class ProgressBar:
    """Counts finished runs and shows the best AP among them; a context manager.

    Args:
        states: of all runs of the plan.
    """

    def __init__(self, states: Iterable[RunState]) -> None:
        states = list(states)
        self._best: tuple[float, str] | None = None
        tqdm.monitor_interval = 0  # its thread would be in the way of forks
        self._bar = tqdm(
            total=len(states),
            initial=sum(state.is_finished for state in states),
            unit="run",
            miniters=0,  # the time goes on between two runs
            mininterval=1 if sys.stderr.isatty() else 60,  # a log file need not hold every second
        )
        for state in states:
            self._consider(state)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def ended(self, state: RunState) -> None:
        """Prints a line about a run whose process has ended."""
        self._consider(state)
        self._bar.write(f"{state.spec.title}: {_line(state)}")
        self._bar.update(int(state.is_finished))

    def show(self, running: int) -> None:
        """Brings the bar up to date, if it is time for that."""
        parts = [f"{running} running"]
        if self._best is not None:
            parts.append(f"best AP {self._best[0]:.1f} ({self._best[1]})")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update(0)

    def _consider(self, state: RunState) -> None:
        ap = state.outcome.final.get("AP") if state.is_finished else None
        if ap is not None and (self._best is None or ap > self._best[0]):
            self._best = (ap, state.spec.title)


def _line(state: RunState) -> str:
    parts = [state.text()]
    best = state.outcome.best("AP")
    if state.is_finished and best is not None:
        parts.append(f"best {best:.1f}")
    parts.append(f"{state.wall_seconds / 60:.1f} min")
    return ", ".join(parts)
