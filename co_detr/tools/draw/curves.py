"""Training curves from the file `metrics.jsonl` of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # works without a display

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from co_detr.moved import present_loss
from co_detr.tools.draw.fonts import save_figure

TOTAL_LOSS = "total_loss"
VALIDATION_LOSS = "val_loss/total"
_EVALUATION = (
    ("bbox/AP", "AP", "-"),
    ("bbox/AP50", "AP50", "--"),
    ("segm/AP", "AP of masks", ":"),
)
_LINE_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Series:
    """One number over training: `iterations` (N,) int and `values` (N,) float."""

    iterations: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class TrainingLog:
    """All numbers of one run by the name under which they were logged."""

    name: str
    series: dict[str, Series]

    def losses_by_part(self) -> dict[str, Series]:
        """Sums the losses of each part: "matching.loss_cls" and "matching.d0.loss_giou" both
        belong to "matching". Names without a dot form the part "other".

        A point counts where all losses of the part were logged; those of the val set are others.
        """
        members: dict[str, list[Series]] = {}
        for name, series in sorted(self.series.items()):
            if "loss" in name and "/" not in name and name != TOTAL_LOSS:
                part = name.split(".")[0] if "." in name else "other"
                members.setdefault(part, []).append(series)
        return {part: _sum_series(series) for part, series in members.items()}


def read_log(path: Path, name: str) -> TrainingLog:
    """Reads a metrics file; where a run was resumed or repeated, the later numbers count.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not JSON, or the file holds no iteration at all.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; train first, or give the output folder of a run."
        )
    points: dict[str, dict[int, float]] = {}
    last = -1
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            iteration = int(record["iteration"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines):
                break  # the run was killed while it wrote its last line
            raise ValueError(
                f"{path}, line {number} is not a metrics record ({error!r}); remove that line."
            ) from error
        if iteration < last:
            # Training went back to a checkpoint: what came after it did not happen.
            for values in points.values():
                for stale in [key for key in values if key >= iteration]:
                    del values[stale]
        last = iteration
        for key, value in record.items():
            if key != "iteration" and isinstance(value, (int, float)):
                points.setdefault(present_loss(key), {})[iteration] = float(value)
    series = {key: _to_series(values) for key, values in points.items() if values}
    if not series:
        raise ValueError(f"{path} holds no metrics yet; train for at least one log period.")
    return TrainingLog(name, series)


def plot_training_curves(logs: list[TrainingLog], path: Path) -> None:
    """Writes one figure: total loss, losses by part, and AP, with all runs laid over it.

    Color tells runs apart in the first and third panel; in the second, color is the part and
    line style is the run.
    """
    if not logs:
        raise ValueError("plot_training_curves needs at least one training log, got none.")
    figure, (total, parts, precision) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    _plot_total(total, logs)
    _plot_parts(parts, logs)
    _plot_precision(precision, logs)
    for axes in (total, parts, precision):
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=110)
    plt.close(figure)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centered moving average over `window` points; near the ends over those that exist."""
    half = window // 2
    padded = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (padded[high] - padded[low]) / (high - low)


def _plot_total(axes: Axes, logs: list[TrainingLog]) -> None:
    axes.set_title("total loss")
    for index, log in enumerate(logs):
        if TOTAL_LOSS not in log.series:
            continue
        series = log.series[TOTAL_LOSS]
        axes.plot(series.iterations, series.values, color=f"C{index}", alpha=0.25, linewidth=1)
        _plot_smoothed(axes, series, color=f"C{index}", label=log.name)
        if VALIDATION_LOSS in log.series:
            on_val = log.series[VALIDATION_LOSS]
            style = {"color": f"C{index}", "marker": "o", "linestyle": "--", "markersize": 4}
            axes.plot(on_val.iterations, on_val.values, **style, label=f"{log.name}, val set")
    _log_scale_if_positive(axes)
    _legend_or_note(axes, "no loss was logged")


def _plot_parts(axes: Axes, logs: list[TrainingLog]) -> None:
    axes.set_title("losses by part")
    parts_of_logs = [log.losses_by_part() for log in logs]
    names = sorted({name for parts in parts_of_logs for name in parts})
    colors = plt.get_cmap("tab10" if len(names) <= 10 else "tab20").colors
    for index, (log, parts) in enumerate(zip(logs, parts_of_logs, strict=True)):
        suffix = f" ({log.name})" if len(logs) > 1 else ""
        for name, series in parts.items():
            _plot_smoothed(
                axes,
                series,
                color=colors[names.index(name) % len(colors)],
                linestyle=_LINE_STYLES[index % len(_LINE_STYLES)],
                label=name + suffix,
            )
    _log_scale_if_positive(axes)
    _legend_or_note(axes, "no losses by part were logged")


def _plot_precision(axes: Axes, logs: list[TrainingLog]) -> None:
    axes.set_title("AP on the validation set")
    for index, log in enumerate(logs):
        suffix = f" ({log.name})" if len(logs) > 1 else ""
        for key, label, style in _EVALUATION:
            if key in log.series:
                series = log.series[key]
                axes.plot(
                    series.iterations,
                    series.values,
                    f"C{index}o{style}",
                    markersize=4,
                    label=f"{label}{suffix}: {series.values[-1]:.1f}",
                )
    axes.set_ylim(0, 100)
    _legend_or_note(axes, "no evaluation yet")


def _plot_smoothed(axes: Axes, series: Series, **style: object) -> None:
    window = max(1, len(series.values) // 20)
    axes.plot(series.iterations, smooth(series.values, window), linewidth=1.6, **style)


def _log_scale_if_positive(axes: Axes) -> None:
    values = [line.get_ydata() for line in axes.get_lines()]
    if values and all((value > 0).all() for value in values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")  # 20, not 2 x 10^1
        axes.yaxis.set_minor_formatter(NullFormatter())


def _legend_or_note(axes: Axes, note: str) -> None:
    if axes.get_lines():
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, note, transform=axes.transAxes, ha="center", color="gray")


def _to_series(values: dict[int, float]) -> Series:
    iterations = sorted(values)
    return Series(np.array(iterations), np.array([values[key] for key in iterations]))


def _sum_series(members: list[Series]) -> Series:
    shared = set.intersection(*(set(series.iterations.tolist()) for series in members))
    total = dict.fromkeys(sorted(shared), 0.0)
    for series in members:
        for iteration, value in zip(series.iterations.tolist(), series.values, strict=True):
            if iteration in total:
                total[iteration] += float(value)
    return _to_series(total)
