"""Checks whole files: a case of the reference, or its unit-level goldens."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from co_detr.parity.case import Case
from co_detr.parity.eval_mode import check_eval
from co_detr.parity.report import Report, flatten
from co_detr.parity.train_atss import check_atss
from co_detr.parity.train_losses import check_gradients, check_losses
from co_detr.parity.train_queries import check_queries
from co_detr.parity.train_roi import check_roi
from co_detr.parity.train_rpn import check_rpn
from co_detr.parity.train_run import run_training
from co_detr.parity.units import check_units

SUPPORTED_KINDS = ("A",)


def check_file(path: Path) -> Report:
    """Compares one golden file with our code.

    A case of a kind that is not supported gives a report whose only line says so.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party deprecations would hide the report
        if not path.name.startswith("case_"):
            return check_units(torch.load(path, weights_only=True))
        case = Case.load(path)
        report = Report(flatten(case.own, ""))
        if case.kind not in SUPPORTED_KINDS:
            for entry in case.own:
                report.not_yet(entry, f"kind {case.kind} belongs to Co-DINO")
            return report
        return _check_case(case, report)


def _check_case(case: Case, report: Report) -> Report:
    report.given("meta", "describes the model")
    for entry in (
        "images_uint8_rgb",
        "batch",
        "image_sizes_hw",
        "scale_factors_wh",
        "state_dict",
        "gt_boxes_xyxy",
        "gt_labels",
    ):
        if report.has(entry):
            report.given(entry, "input")
    zero_padding = any(
        each["attn_masks"] is not None for each in case.own.get("train", {}).get("aux", [])
    )
    padding = "mask" if zero_padding else "negatives"
    if "eval" in case.own:
        check_eval(report, case, case.build(padding).eval())
    for prefix in ("train", "train_finite"):
        if prefix in case.own:
            _check_training(report, case, prefix, padding)
    report.finish()
    return report


def _check_training(report: Report, case: Case, prefix: str, padding: str) -> None:
    # A second dump of the same step only repeats what differs from the first.
    entries = {**case.own["train"], **case.own[prefix]}
    run = run_training(case, case.build(padding), entries)
    report.given(f"{prefix}.seed", "of the reference's draws")
    report.given(f"{prefix}.aux_randperms", "replayed")
    check_queries(report, prefix, run)
    for part, check in (("rpn", check_rpn), ("roi", check_roi), ("atss", check_atss)):
        if report.has(f"{prefix}.{part}"):
            check(report, prefix, run)
    check_losses(report, prefix, run)
    check_gradients(report, prefix, run)
