"""What an evaluation says of a model's detectors: a table, the best one, how to use it."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from co_detr.modeling.detectors import DECODER, TOP_K

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float]  # from 0 to 100; what is undefined is left out


def metrics_of(metrics: Metrics, kind: str) -> dict[str, float]:
    """The metrics of one kind of detections: ``<kind>/AP``, or ``AP`` itself for the decoder."""
    if kind == DECODER:
        return dict(metrics)
    prefix = f"{kind}/"
    return {
        key.removeprefix(prefix): each for key, each in metrics.items() if key.startswith(prefix)
    }


def detector_table(metrics: Metrics, kinds: Sequence[str], columns: Sequence[str]) -> str:
    """One line for the decoder and for each kind; the best AP is marked.

    Args:
        metrics: as `evaluate` returns them.
        kinds: of detections beside the decoder's.
        columns: names of metrics.
    """
    best = best_detector(metrics, kinds)
    rows = []
    for kind in (DECODER, *kinds):
        own = metrics_of(metrics, kind)
        numbers = [f"{own[name]:.1f}" if name in own else "" for name in columns]
        rows.append((kind, *numbers, "best AP" if kind == best else ""))
    align = ("left", *("right" for _ in columns), "left")
    headers = ("detector", *columns, "")
    return tabulate(rows, headers, tablefmt="github", colalign=align, disable_numparse=True)


def best_detector(metrics: Metrics, kinds: Sequence[str]) -> str | None:
    """Of all that can be asked for by name; the first one of equals, None without an AP."""
    found = {
        kind: metrics_of(metrics, kind)["AP"]
        for kind in (DECODER, *kinds)
        if kind != TOP_K and "AP" in metrics_of(metrics, kind)
    }
    return max(found, key=found.__getitem__, default=None)


def log_best_detector(metrics: Metrics, kinds: Sequence[str], config: str, checkpoint: str) -> None:
    """Names the best detector of a model that has several, and the command that uses it.

    Args:
        config, checkpoint: files that the command names; without a checkpoint there is nothing to
            use, and nothing is logged.
    """
    best = best_detector(metrics, kinds)
    if best is None or not checkpoint or not set(kinds) - {TOP_K}:
        return
    command = ["python", "predict.py", "--config-file", config, "--checkpoint", checkpoint]
    command += [] if best == DECODER else ["--detector", best]
    own, decoder = metrics_of(metrics, best), metrics.get("AP")
    beside = "" if best == DECODER or decoder is None else f"; the decoder has {decoder:.1f}"
    logger.info(
        "The best detector of this model is %s (AP %.1f%s). To use it:\n  %s IMAGES --output drawn",
        *(best, own["AP"], beside, shlex.join(command)),
    )
