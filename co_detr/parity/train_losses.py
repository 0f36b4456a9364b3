"""Compares losses and gradients of a training step."""

from __future__ import annotations

import re
import statistics

import torch
from torch import Tensor

from co_detr.checkpoint import rename_official
from co_detr.parity import tolerances as tol
from co_detr.parity.report import Report
from co_detr.parity.train_run import TrainingRun

NAN_NOTE = "reference-nan: zero padding masks whole rows there; ours is finite"
_TERMS = {
    "loss_cls": "loss_cls",
    "loss_bbox": "loss_bbox",
    "loss_giou": "loss_iou",
    "loss_rpn_cls": "loss_rpn_cls",
    "loss_rpn_loc": "loss_rpn_bbox",
    "loss_box_reg": "loss_bbox",
    "loss_centreness": "loss_centerness",
}
_SUFFIX = {"matching": "", "roi_queries": "_aux0", "atss_queries": "_aux1", "roi": "0", "atss": "1"}


def official_loss_name(name: str) -> str:
    """``roi_queries.d0.loss_giou`` -> ``d0.loss_iou_aux0``, and so on."""
    group, *layer, term = name.split(".")
    if layer == ["enc"]:
        return f"enc_{_TERMS[term]}"
    suffix = "" if term.startswith("loss_rpn") else _SUFFIX[group]
    return ".".join([*layer, _TERMS[term] + suffix])


def check_losses(report: Report, prefix: str, run: TrainingRun) -> None:
    """``losses``, ``losses_raw`` (level lists are summed) and ``total_loss`` below ``prefix``."""
    ours = {official_loss_name(k): v.detach() for k, v in run.output.losses.items()}
    ours["acc0"] = _accuracy(run)
    ours["loss"] = torch.stack(list(run.output.losses.values())).sum().detach()
    for kind in ("losses", "losses_raw"):
        start = f"{prefix}.{kind}."
        names = {
            re.sub(r"\[\d+\]$", "", e.removeprefix(start))
            for e in report.entries
            if e.startswith(start)
        }
        for name in sorted(names):
            _compare(report, start + name, ours.get(name))
        missing = set(ours) - names - {"loss"}
        if report.has(f"{prefix}.{kind}") and missing:
            report.verdict(f"{prefix}.{kind}", False, f"only ours: {sorted(missing)}")
    _compare(report, f"{prefix}.total_loss", ours["loss"])


def _compare(report: Report, name: str, ours: Tensor | None) -> None:
    if ours is None:
        report.verdict(name, False, "we have no such loss")
        return
    values = [v for k, v in report.entries.items() if k == name or k.startswith(f"{name}[")]
    reference = sum(float(value) for value in values)
    if reference != reference:
        report.known(name, NAN_NOTE, bool(ours.isfinite()))
        return
    error = abs(reference - float(ours)) / max(abs(reference), 1e-30)
    if reference == 0:
        error = abs(float(ours))
    note = f"{float(ours):.7g}, rel {error:.1e}, at most {tol.LOSS:.1e}"
    report.verdict(name, error <= tol.LOSS, note)


def _accuracy(run: TrainingRun) -> Tensor:
    """Percent of sampled proposals whose class the ROI head got right."""
    labels = run.entries["roi"]["targets"]["labels"]
    return 100.0 * (run.scores.argmax(1) == labels).float().mean()


def check_gradients(report: Report, prefix: str, run: TrainingRun) -> None:
    """``grads``, ``grad_norms`` and ``grad_none`` below ``prefix``."""
    ours = {
        name: parameter.grad
        for name, parameter in run.model.named_parameters()
        if parameter.grad is not None
    }
    entries = run.entries
    if entries["total_loss"] != entries["total_loss"]:
        # Some gradients are finite even then, but lack what the NaN queries should have added.
        finite = all(bool(gradient.isfinite().all()) for gradient in ours.values())
        for part in ("grads", "grad_norms", "grad_none"):
            report.known(f"{prefix}.{part}", NAN_NOTE, finite)
        return
    errors = []
    for key, norm in entries["grad_norms"].items():
        name = f"{prefix}.grad_norms.{key}"
        actual = torch.cat([ours[k].flatten() for k in _our_keys(key, run)]).norm().item()
        # Norms far below the step's largest are rounding noise of the reference itself.
        scale = max(norm, 1e-7 * max(entries["grad_norms"].values()))
        errors.append(abs(actual - norm) / scale)
        note = f"{actual:.5g}, rel {errors[-1]:.1e}, at most {tol.GRADIENT:.1e}"
        report.verdict(name, errors[-1] <= tol.GRADIENT, note)
    if errors:
        median = statistics.median(errors)
        note = f"median of all norms: rel {median:.1e}, at most {tol.GRADIENT_MEDIAN:.1e}"
        report.verdict(f"{prefix}.grad_norms", median <= tol.GRADIENT_MEDIAN, note)
    for key, gradient in entries["grads"].items():
        _check_gradient(report, f"{prefix}.grads.{key}", run, key, gradient, ours)
    frozen = {key.removesuffix(" [frozen]") for key in entries["grad_none"]}
    trained = {k for key in frozen for k in _our_keys(key, run) if k in ours}
    note = f"frozen there, trained here: {sorted(trained)}" if trained else "no gradient here"
    for name in [e for e in report.entries if e.startswith(f"{prefix}.grad_none")]:
        report.verdict(name, not trained, note)


def _check_gradient(
    report: Report, name: str, run: TrainingRun, key: str, gradient: Tensor, ours: dict
) -> None:
    renamed = rename_official({key: gradient}, run.model).state_dict
    expected = torch.cat([value.flatten() for value in renamed.values()])
    actual = torch.cat([ours[k].flatten() for k in renamed])
    scale = max(expected.norm().item(), 1e-7 * max(g.norm().item() for g in ours.values()))
    error = (expected - actual).norm().item() / scale
    report.verdict(name, error <= tol.GRADIENT, f"rel {error:.1e}, at most {tol.GRADIENT:.1e}")


def _our_keys(key: str, run: TrainingRun) -> list[str]:
    heads = len(run.model.auxiliary.heads)
    placeholder = torch.zeros(36, 1) if "rpn" in key else torch.zeros(heads, 1)
    return list(rename_official({key: placeholder}, run.model).state_dict)
