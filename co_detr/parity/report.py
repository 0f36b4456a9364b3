"""Book-keeping of a fidelity check: every entry of a golden file must be accounted for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Line:
    """One printed line.

    Attributes:
        status: ``ok``, ``FAIL``, ``given`` (fed to our code instead of compared), ``known``
            (differs by design; the note names the difference) or ``not yet`` (belongs to a part
            that this project does not have yet).
    """

    name: str
    status: str
    absolute: float = math.nan
    relative: float = math.nan
    tolerance: str = ""
    note: str = ""

    def __str__(self) -> str:
        errors = (
            "" if math.isnan(self.absolute) else f"{self.absolute:.1e} abs {self.relative:.1e} rel"
        )
        return f"{self.status:<8}{self.name:<58} {errors:<24} {self.tolerance:<14} {self.note}".rstrip()


@dataclass
class Report:
    """Compares the entries of one golden file and remembers which are left.

    Attributes:
        entries: leaves of the file by dotted name, for example ``train.rpn.proposals[0]``.
        lines: what has been printed.
    """

    entries: dict[str, Any]
    lines: list[Line] = field(default_factory=list)
    _left: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self._left = set(self.entries)

    @property
    def failed(self) -> bool:
        return any(line.status == "FAIL" for line in self.lines)

    def has(self, prefix: str) -> bool:
        """Whether the file has entries at or below ``prefix``."""
        return any(_below(name, prefix) for name in self.entries)

    def finish(self) -> None:
        """Fails every entry that nothing compared."""
        for name in sorted(self._left):
            self.lines.append(Line(name, "FAIL", note="not compared"))

    def given(self, prefix: str, note: str) -> None:
        """Marks the entries below ``prefix`` as inputs of the check."""
        for name in self._take(prefix):
            self.lines.append(Line(name, "given", note=note))

    def known(self, prefix: str, note: str, holds: bool) -> None:
        """Marks a named difference by design; fails if what explains it does not hold."""
        for name in self._take(prefix):
            self.lines.append(Line(name, "known" if holds else "FAIL", note=note))

    def not_yet(self, prefix: str, note: str) -> None:
        """Marks entries of a part of the reference that this project does not have yet."""
        for name in self._take(prefix):
            self.lines.append(Line(name, "not yet", note=note))

    def verdict(self, prefix: str, ok: bool, note: str) -> None:
        """Records a comparison made by the caller."""
        for name in self._take(prefix):
            self.lines.append(Line(name, "ok" if ok else "FAIL", note=note))

    def exact(self, name: str, actual: Any) -> None:
        """Compares integers, booleans, strings or lists of them for equality."""
        self._each(name, actual, lambda leaf, value: self._exact(leaf, value))

    def close(
        self, name: str, actual: Any, atol: float = 0.0, rtol: float = 0.0, note: str = ""
    ) -> None:
        """Compares floats or (nested lists of) tensors; infinities must be in the same places.

        The relative error is that of the largest deviation, relative to the largest magnitude.
        """
        self._each(name, actual, lambda leaf, value: self._close(leaf, value, atol, rtol, note))

    def rows(self, name: str, actual: Tensor, atol: float) -> None:
        """Compares ``(N, X)`` tensors as sets of rows: each row has a partner on the other side."""
        for leaf in self._take(name):
            expected = self.entries[leaf].to(actual.dtype)
            if expected.shape != actual.shape:
                note = f"shape {tuple(actual.shape)}, reference {tuple(expected.shape)}"
                self.lines.append(Line(leaf, "FAIL", note=note))
                continue
            distance = (expected[:, None] - actual[None]).abs().amax(-1)
            worst = max(distance.amin(0).max().item(), distance.amin(1).max().item())
            status = "ok" if worst <= atol else "FAIL"
            scale = expected.abs().max().item()
            self.lines.append(
                Line(leaf, status, worst, worst / max(scale, 1e-30), f"abs {atol:.1e}", "as a set")
            )

    def _take(self, prefix: str) -> Iterator[str]:
        names = [name for name in self.entries if _below(name, prefix)]
        if not names:
            self.lines.append(Line(prefix, "FAIL", note="the file has no such entry"))
        self._left.difference_update(names)
        return iter(names)

    def _each(self, name: str, actual: Any, compare) -> None:
        leaves = flatten(actual, name)
        names = [each for each in self.entries if _below(each, name)]
        for missing in [each for each in names if each not in leaves]:
            self._left.discard(missing)
            self.lines.append(Line(missing, "FAIL", note="we have no such entry"))
        for leaf, value in leaves.items():
            if leaf not in self.entries:
                self.lines.append(Line(leaf, "FAIL", note="the file has no such entry"))
                continue
            self._left.discard(leaf)
            compare(leaf, value)

    def _exact(self, name: str, actual: Any) -> None:
        expected = self.entries[name]
        if isinstance(expected, Tensor):
            same = torch.is_tensor(actual) and expected.shape == actual.shape
            wrong = int((expected != actual).sum()) if same else -1
            note = "" if wrong == 0 else f"{wrong} of {expected.numel()} differ"
            self.lines.append(
                Line(name, "ok" if wrong == 0 else "FAIL", tolerance="equal", note=note)
            )
        else:
            note = "" if expected == actual else f"{actual!r}, reference {expected!r}"
            self.lines.append(Line(name, "FAIL" if note else "ok", tolerance="equal", note=note))

    def _close(self, name: str, actual: Any, atol: float, rtol: float, note: str) -> None:
        expected = torch.as_tensor(self.entries[name], dtype=torch.float64)
        actual = torch.as_tensor(actual).detach().to(torch.float64)
        if expected.numel() == actual.numel() == 1:  # the reference logs some scalars as (1,)
            actual = actual.reshape(expected.shape)
        if expected.shape != actual.shape:
            note = f"shape {tuple(actual.shape)}, reference {tuple(expected.shape)}"
            self.lines.append(Line(name, "FAIL", note=note))
            return
        finite = expected.isfinite()
        special = bool(((expected == actual) | finite).all()) and bool(
            actual[finite].isfinite().all()
        )
        difference = (expected - actual)[finite].abs()
        worst = difference.max().item() if difference.numel() else 0.0
        scale = expected[finite].abs().max().item() if difference.numel() else 0.0
        ok = special and worst <= atol + rtol * scale
        tolerance = " ".join(
            f"{kind} {value:.1e}" for kind, value in (("abs", atol), ("rel", rtol)) if value
        )
        note = note if special else "non-finite values differ"
        relative = worst / scale if scale else 0.0
        self.lines.append(Line(name, "ok" if ok else "FAIL", worst, relative, tolerance, note))


def flatten(value: Any, name: str) -> dict[str, Any]:
    """Leaves of nested dicts, lists and tuples by dotted name; plain lists of numbers are leaves."""
    if isinstance(value, dict):
        items = [(f"{name}.{key}" if name else str(key), each) for key, each in value.items()]
    elif isinstance(value, list | tuple) and any(_nested(each) for each in value):
        items = [(f"{name}[{index}]", each) for index, each in enumerate(value)]
    else:
        return {name: value}
    return {leaf: each for key, inner in items for leaf, each in flatten(inner, key).items()}


def _nested(value: Any) -> bool:
    return isinstance(value, Tensor | dict | list | tuple)


def _below(name: str, prefix: str) -> bool:
    return name == prefix or (name.startswith(prefix) and name[len(prefix)] in ".[")
