"""The measures by name, in the order of the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from co_detr.analysis.attention import measure_attention
from co_detr.analysis.conflict import measure_conflict
from co_detr.analysis.discriminability import measure_discriminability
from co_detr.analysis.error_analysis import measure_errors
from co_detr.analysis.instability import measure_instability
from co_detr.analysis.positives import measure_positives
from co_detr.analysis.section import Section
from co_detr.analysis.subject import Progress, Sample, Subject
from co_detr.errors import ConfigError

Measure = Callable[[Sequence[Subject], Sequence[Sample], Progress], Section]

MEASURES: dict[str, Measure] = {
    "discriminability": measure_discriminability,
    "attention": measure_attention,
    "conflict": measure_conflict,
    "positives": measure_positives,
    "instability": measure_instability,
    "errors": measure_errors,
}


def choose_measures(names: Sequence[str] | None) -> dict[str, Measure]:
    """Those named, in the order of the report; all for None.

    Raises:
        ConfigError: if there is no measure of a name.
    """
    unknown = [name for name in names or () if name not in MEASURES]
    if unknown:
        raise ConfigError(f"there is no measure {unknown[0]}: choose {', '.join(MEASURES)}.")
    return {name: run for name, run in MEASURES.items() if names is None or name in names}
