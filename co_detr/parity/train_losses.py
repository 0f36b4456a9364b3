"""Compares the losses of a training step."""

from __future__ import annotations

import re
from math import inf, isnan

import torch
from torch import Tensor

from co_detr.parity import tolerances as tol
from co_detr.parity.compare import deviation
from co_detr.parity.differences import REFERENCE_NAN, RPN_NORMALISER
from co_detr.parity.report import Report, describe
from co_detr.parity.train_run import TrainingRun

_TERMS = {
    "loss_cls": "loss_cls",
    "loss_bbox": "loss_bbox",
    "loss_giou": "loss_iou",
    "loss_rpn_cls": "loss_rpn_cls",
    "loss_rpn_loc": "loss_rpn_bbox",
    "loss_box_reg": "loss_bbox",
    "loss_centreness": "loss_centerness",
}
_SUFFIX = {"roi_queries": "_aux0", "atss_queries": "_aux1", "roi": "0", "atss": "1"}


def official_loss_name(name: str) -> str:
    """``roi_queries.d0.loss_giou`` -> ``d0.loss_iou_aux0``, and so on."""
    group, *layer, term = name.split(".")
    if layer == ["enc"]:
        return f"enc_{_TERMS[term]}"
    start = "dn_" if group == "denoising" else ""
    suffix = "" if term.startswith("loss_rpn") else _SUFFIX.get(group, "")
    return ".".join([*layer, start + _TERMS[term] + suffix])


def check_losses(report: Report, prefix: str, run: TrainingRun) -> None:
    """``losses``, ``losses_raw`` (level lists are summed) and ``total_loss`` below ``prefix``."""
    losses = run.output.losses
    ours = {official_loss_name(name): float(value) for name, value in losses.items()}
    ours["acc0"] = float(_accuracy(run))
    total = float(torch.stack(list(losses.values())).sum())
    for kind in ("losses", "losses_raw"):
        start = f"{prefix}.{kind}."
        names = {
            re.sub(r"\[\d+\]$", "", entry.removeprefix(start)): None
            for entry in report.entries
            if entry.startswith(start)
        }
        if not names:
            report.fail(f"{prefix}.{kind}", "the file has none")
            continue
        # The sum of all is logged beside the terms, but not returned with them.
        expected = {**ours, "loss": total} if "loss" in names else ours
        for name in {**names, **dict.fromkeys(expected)}:
            _compare(report, run, start + name, expected.get(name))
    _compare(report, run, f"{prefix}.total_loss", total)


def _compare(report: Report, run: TrainingRun, name: str, ours: float | None) -> None:
    if ours is None:
        report.fail(name, "we have no such loss")
        return
    values = [v for k, v in report.entries.items() if k == name or k.startswith(f"{name}[")]
    if not values:
        report.fail(name, "the file has no such entry")
        return
    reference = sum(float(value) for value in values)
    if isnan(reference):
        is_reached = "_aux" in name or name.endswith((".loss", ".total_loss"))
        holds = run.reference_masks_rows and is_reached and abs(ours) < inf
        report.known(name, REFERENCE_NAN, holds, f"ours is {ours:.7g}")
        return
    limits = {"rtol": tol.LOSS} if reference else {"atol": tol.ZERO_LOSS}
    found = deviation(reference, ours, **limits)
    note = f"{ours:.7g}" + (" is the sum over levels" if len(values) > 1 else "")
    bridged = RPN_NORMALISER if "loss_rpn" in name else None
    report.record(name, found, describe(limits.get("atol", 0.0), tol.LOSS), note, bridged)


def _accuracy(run: TrainingRun) -> Tensor:
    """Percent of sampled proposals whose class the ROI head got right."""
    labels = run.entries["roi"]["targets"]["labels"]
    return 100.0 * (run.scores.argmax(1) == labels).float().mean()
