"""Compares the gradients of a training step."""

from __future__ import annotations

import statistics
from math import isnan

import torch
from torch import Tensor

from co_detr.checkpoint.official import rename_official
from co_detr.parity import tolerances as tol
from co_detr.parity.compare import Deviation
from co_detr.parity.differences import REFERENCE_NAN
from co_detr.parity.report import Report, describe
from co_detr.parity.train_run import TrainingRun

# No loss of the positive queries reaches these, so NaN there is no reason for NaN here.
UNREACHED = ("auxiliary.heads.", "queries.")


def check_gradients(report: Report, prefix: str, run: TrainingRun) -> None:
    """``grads``, ``grad_norms`` and ``grad_none`` below ``prefix``."""
    check = _GradientCheck(report, prefix, run)
    check.norms()
    for key, gradient in run.entries["grads"].items():
        check.gradient(key, gradient)
    check.frozen()


class _GradientCheck:
    def __init__(self, report: Report, prefix: str, run: TrainingRun):
        self.report, self.prefix, self.run = report, prefix, run
        self.ours = {
            name: parameter.grad
            for name, parameter in run.model.named_parameters()
            if parameter.grad is not None
        }
        # A gradient of zeros is as good as none: without any ground truth, labels of denoising
        # queries have the former here so that distributed training finds all parameters used.
        self.moved = {name for name, gradient in self.ours.items() if gradient.any()}
        largest = max(gradient.norm().item() for gradient in self.ours.values())
        self.noise = tol.GRADIENT_NOISE * largest

    def norms(self) -> None:
        """Every norm, their median, and that both sides train the same parameters."""
        name, errors, trained = f"{self.prefix}.grad_norms", [], set()
        for key, norm in self.run.entries["grad_norms"].items():
            names = self.our_names(key)
            trained.update(names)
            actual = self.flat(names)
            if actual is None:
                self.report.fail(f"{name}.{key}", "no gradient here")
                continue
            found = self.deviate(abs(norm - actual.norm().item()), norm)
            if not isnan(norm):
                errors.append(found.relative)
            self.conclude(f"{name}.{key}", found, names, actual, isnan(norm))
        extra = sorted(self.moved - trained)
        note = f"trained only here: {extra[:5]}" if extra else f"{len(trained)} parameters"
        self.report.derived(f"<parameters in {name}>", _count(len(extra)), "equal", note)
        if errors:
            median = statistics.median(errors)
            ratio = median / tol.GRADIENT_MEDIAN
            found = Deviation(ratio <= 1, relative=median, ratio=ratio)
            self.report.derived(f"<median of {name}>", found, describe(0.0, tol.GRADIENT_MEDIAN))

    def gradient(self, key: str, gradient: Tensor) -> None:
        """A whole gradient; the error is the norm of the deviation."""
        name = f"{self.prefix}.grads.{key}"
        renamed = rename_official({key: gradient}, self.run.model).state_dict
        expected = torch.cat([value.flatten() for value in renamed.values()])
        actual = self.flat(list(renamed))
        if actual is None or actual.shape != expected.shape:
            self.report.fail(name, "no such gradient here")
            return
        found = self.deviate((expected - actual).norm().item(), expected.norm().item())
        self.conclude(name, found, list(renamed), actual, bool(expected.isnan().any()))

    def frozen(self) -> None:
        """``grad_none``: parameters without gradient."""
        name = f"{self.prefix}.grad_none"
        if not self.report.has(name):
            return
        keys = [key.removesuffix(" [frozen]") for key in self.run.entries["grad_none"]]
        trained = [key for key in keys if self.moved & {*self.our_names(key)}]
        note = f"trained here: {trained[:5]}" if trained else f"{len(keys)} parameters"
        self.report.record(name, _count(len(trained)), "equal", note)

    def our_names(self, key: str) -> list[str]:
        return list(rename_official({key: self.run.case.weights[key]}, self.run.model).state_dict)

    def flat(self, names: list[str]) -> Tensor | None:
        if not names or any(name not in self.ours for name in names):
            return None
        return torch.cat([self.ours[name].flatten() for name in names])

    def deviate(self, error: float, norm: float) -> Deviation:
        relative = error / max(norm, self.noise)
        return Deviation(relative <= tol.GRADIENT, error, relative, relative / tol.GRADIENT)

    def conclude(
        self, name: str, found: Deviation, names: list[str], actual: Tensor, is_nan: bool
    ) -> None:
        """An entry that NaN of the reference's padded queries spoilt is a known difference.

        They also spoil some finite ones: the gradient of a value projection of the decoder lacks
        what queries at NaN positions, which sample nothing, should have added.
        """
        lacks_queries = all("decoder." in each and ".value_proj." in each for each in names)
        if not is_nan and not (self.run.reference_masks_rows and lacks_queries):
            self.report.record(name, found, describe(0.0, tol.GRADIENT))
            return
        holds = self.run.reference_masks_rows and bool(actual.isfinite().all())
        holds = holds and not any(each.startswith(UNREACHED) for each in names)
        note = "NaN" if is_nan else f"finite, but without the padded queries ({found.relative:.1e})"
        self.report.known(name, REFERENCE_NAN, holds, note)


def _count(wrong: int) -> Deviation:
    return Deviation(not wrong, float(wrong), ratio=float(wrong))
