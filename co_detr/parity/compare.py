"""How far our numbers are from the reference's."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, nan
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# One number, or one per column of the last axis.
Limit = float | tuple[float, ...]


@dataclass(frozen=True)
class Deviation:
    """Outcome of one comparison.

    Attributes:
        absolute: largest deviation.
        relative: the same, relative to the largest magnitude of the reference.
        ratio: largest deviation in units of what is allowed; more than 1 is too much.
        note: why it is not ok, unless the numbers say so.
    """

    ok: bool
    absolute: float = nan
    relative: float = nan
    ratio: float = nan
    note: str = ""


def deviation(
    expected: Any, actual: Any, atol: Limit = 0.0, rtol: float = 0.0, where: Tensor | None = None
) -> Deviation:
    """Compares numbers or tensors; infinities must be in the same places, NaN never agrees.

    Args:
        atol: allowed deviation; rtol: the same, relative to the largest magnitude.
        where: bool, broadcast from the right to the shape; elsewhere nothing is compared.
    """
    expected = torch.as_tensor(expected).detach().to(torch.float64)
    actual = torch.as_tensor(actual).detach().to(torch.float64)
    if expected.numel() == actual.numel() == 1:  # the reference logs some scalars as (1,)
        actual = actual.reshape(expected.shape)
    if expected.shape != actual.shape:
        note = f"shape {tuple(actual.shape)}, reference {tuple(expected.shape)}"
        return Deviation(False, note=note)
    limit = torch.as_tensor(atol, dtype=torch.float64).broadcast_to(expected.shape)
    if where is not None:
        where = where.broadcast_to(expected.shape)
        expected, actual, limit = expected[where], actual[where], limit[where]
    finite = expected.isfinite()
    special = bool(((expected == actual) | finite).all() and actual[finite].isfinite().all())
    if not special:
        return Deviation(False, inf, inf, inf, "non-finite values differ")
    difference = (expected - actual)[finite].abs()
    if not difference.numel():
        return Deviation(True, 0.0, 0.0, 0.0)
    scale = expected[finite].abs().max().item()
    allowed = limit[finite] + rtol * scale
    # Without any allowance zero must be met exactly: 0 / 0 counts as 0, anything else as infinite.
    ratio = torch.where(difference == 0, 0.0, difference / allowed).max().item()
    worst = difference.max().item()
    relative = worst / scale if scale else (inf if worst else 0.0)
    return Deviation(ratio <= 1, worst, relative, ratio)


def equality(expected: Any, actual: Any) -> Deviation:
    """Compares integers, booleans, strings or lists of them."""
    if not isinstance(expected, Tensor):
        same = not isinstance(actual, Tensor) and expected == actual
        if same:
            return Deviation(True, 0.0, 0.0, 0.0)
        return Deviation(False, note=f"{actual!r}, reference {expected!r}"[:200])
    if not isinstance(actual, Tensor):
        return Deviation(False, note=f"{actual!r}, reference is a tensor"[:200])
    found = deviation(expected, actual)
    if found.ok or expected.shape != actual.shape:
        return found
    wrong = int((expected != actual).sum())
    return Deviation(False, found.absolute, found.relative, inf, f"{wrong} elements differ")


def match_rows(expected: Tensor, actual: Tensor, atol: Limit) -> Tensor:
    """Order that puts the rows of ``actual`` ``(N, X)`` beside those of ``expected``, one to one.

    Rows keep their places where these agree already, or where the shapes leave no choice.
    """
    places = torch.arange(len(actual))
    if expected.shape != actual.shape or not len(actual):
        return places
    limit = torch.as_tensor(atol, dtype=torch.float32)
    if ((expected - actual).abs() <= limit).all():
        return places
    distance = ((expected[:, None] - actual[None]).abs() / limit).amax(-1)
    # Beyond any tolerance all pairs are alike, which keeps the search short.
    cost = torch.nan_to_num(distance, nan=inf).clamp(max=10.0)
    _, columns = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(columns)
