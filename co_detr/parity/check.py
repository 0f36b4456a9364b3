"""Checks whole files: a case of the reference, or its unit-level goldens."""

from __future__ import annotations

import warnings
from pathlib import Path

from co_detr.parity.build import build_model
from co_detr.parity.case import Case
from co_detr.parity.differences import ROI_TRIM
from co_detr.parity.eval_mode import check_eval, check_input
from co_detr.parity.golden_file import flatten, load_golden
from co_detr.parity.report import Report
from co_detr.parity.train_atss import check_atss
from co_detr.parity.train_gradients import check_gradients
from co_detr.parity.train_losses import check_losses
from co_detr.parity.train_queries import check_queries
from co_detr.parity.train_roi import check_roi
from co_detr.parity.train_rpn import check_rpn
from co_detr.parity.train_run import run_training
from co_detr.parity.units import check_units

KINDS = ("A", "B")  # Co-Deformable-DETR, Co-DINO


def check_file(path: Path) -> Report:
    """Compares one golden file with our code.

    Every entry of the file is in the report, whatever happens; a file that cannot be read gives
    a report with one failure.
    """
    report = Report()
    with warnings.catch_warnings(), report.part(path.name):
        warnings.simplefilter("ignore")  # third-party deprecations would hide the report
        if path.name.startswith("case_"):
            _check_case(path, report)
        else:
            check_units(load_golden(path), report)
    report.finish()
    return report


def _check_case(path: Path, report: Report) -> None:
    own = load_golden(path)
    report.entries = flatten(own)
    kind = own["meta"]["kind"]
    if kind not in KINDS:
        raise ValueError(f"meta.kind is {kind!r}, but only {' and '.join(KINDS)} are known.")
    case = Case.of(own, path.parent)
    report.dropped = case.dropped
    report.given("meta", "describes the model")
    if "state_dict" in own:
        report.given("state_dict", "loaded through the converter")
    for entry in ("scale_factors_wh", "gt_boxes_xyxy", "gt_labels"):
        report.given(entry, "input")
    model = build_model(case).eval()
    check_input(report, case, model)
    for part in ("eval", "train"):
        if part not in own:
            report.fail(part, "nothing to compare")  # unless a file of this sort has none
    if "eval" in own:
        check_eval(report, case, model)
    for prefix in ("train", "train_finite"):
        if prefix in own:
            with report.part(prefix):
                _check_training(report, case, prefix)


def _check_training(report: Report, case: Case, prefix: str) -> None:
    # A second dump of the same step only repeats what differs from the first.
    entries = {**case.own["train"], **case.own[prefix]}
    run = run_training(case, build_model(case), entries)
    report.given(f"{prefix}.seed", "of the reference's draws")
    draws = f"{prefix}.aux_randperms"
    if run.draws.remaining:
        report.fail(draws, f"{len(run.draws.remaining)} draws were not needed here")
    else:
        trimmed = ROI_TRIM if run.draws.num_shorter else None
        report.given(draws, "replayed, each where it was drawn", trimmed)
    with report.part(f"{prefix}.aux"):
        check_queries(report, prefix, run)
    for part, check in (("rpn", check_rpn), ("roi", check_roi), ("atss", check_atss)):
        if prefix == "train" or part in case.own[prefix]:
            with report.part(f"{prefix}.{part}"):
                check(report, prefix, run)
    with report.part(f"{prefix}.losses"):
        check_losses(report, prefix, run)
    with report.part(f"{prefix}.grads"):
        check_gradients(report, prefix, run)
