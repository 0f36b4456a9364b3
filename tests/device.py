"""Where the tests compute: ``TEST_DEVICE=cuda pytest`` does on a GPU what the CPU does otherwise.

* Tensors that a file of the tests makes lie on the device (`TensorsOfTests`), with the same values
  on each: they are drawn on the host. Tensors that the project makes lie where it puts them, so
  that one which it forgets on the host is an error.
* Models are moved: ``tiny_model(...)`` lies on the device already, others take ``.to(DEVICE)``.
* Inputs of a model stay on the host, as a data loader gives them (`on_host`).
* ``torch.testing.assert_close`` knows by how much a GPU's float32 may differ (`assert_close`).
* A test that says nothing about the device is marked ``cpu_only("reason")``.

``TEST_DEVICE=emulated`` needs no GPU: a device of its own whose kernels are the CPU's, with which
it is found out whether tests and models keep their tensors together; see `cuda_emulation`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

NAME = os.environ.get("TEST_DEVICE", "cpu")
if NAME == "emulated":
    from tests.cuda_emulation import register_emulated_device

    register_emulated_device(NAME)
ON_CPU = NAME == "cpu"
DEVICE = torch.device(NAME) if ON_CPU else torch.device(NAME, 0)  # as tensors say it
# Of processes that a test starts: the emulated device is known in one process alone.
CHILD = "cpu" if NAME == "emulated" else NAME
# For trainings that are compared bit by bit, as those of the tiny detector are.
EXACT = ["train.deterministic=true", "train.cuda.tf32=false"]
TESTS = Path(__file__).parent
# Whose tests follow TEST_DEVICE, and whose name their devices themselves. The others are about
# files and tables, or about what is done on the CPU alone: traces for export, comparisons with the
# reference's numbers, reports on a model.
FOLDERS = ("modeling", "engine", "prediction")
OF_THEIR_OWN = ("layers", "gpu")
FACTORIES = {
    *(torch.tensor, torch.as_tensor, torch.zeros, torch.ones, torch.full, torch.empty, torch.eye),
    *(torch.arange, torch.linspace, torch.rand, torch.randn, torch.randint, torch.randperm),
}
# How far apart float32 may be on a GPU: sums have another order from one call to the next.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}
_assert_close = torch.testing.assert_close


class TensorsOfTests(TorchFunctionMode):
    """Puts what files of the tests make on `DEVICE`, unless they name a device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if (
            func not in FACTORIES
            or kwargs.get("device") is not None
            or not sys._getframe(1).f_code.co_filename.startswith(f"{TESTS}/")
        ):
            return func(*args, **kwargs)
        needs_grad = kwargs.pop("requires_grad", False)
        return func(*args, **kwargs).to(DEVICE).requires_grad_(needs_grad)


@contextmanager
def on_host() -> Iterator[None]:
    """Tensors made in it lie on the host, as those of a data loader do."""
    with torch._C.DisableTorchFunction() if not ON_CPU else nullcontext():
        yield


def has_device(path: Path) -> bool:
    """Whether the tests in the file ``path`` say something about another device than the CPU."""
    return _lies_in(path, FOLDERS + OF_THEIR_OWN)


def can_be_emulated(item: pytest.Item) -> bool:
    """Whether it is, and its test needs any device instead of a card: `device` of tests/gpu."""
    return NAME == "emulated" and _lies_in(item.path, ("gpu",)) and "device" in item.fixturenames


def _lies_in(path: Path, folders: Sequence[str]) -> bool:
    return any(path.is_relative_to(TESTS / folder) for folder in folders)


@contextmanager
def running(path: Path) -> Iterator[None]:
    """Around everything that belongs to a test in the file ``path``, fixtures included."""
    follows = _lies_in(path, FOLDERS)
    with ExitStack() as stack:
        if NAME == "emulated" and (follows or _lies_in(path, ("gpu",))):
            from tests.cuda_emulation import EmulatedDevice

            stack.enter_context(EmulatedDevice(DEVICE))
        if follows and not ON_CPU:
            _usual_switches()
            stack.enter_context(TensorsOfTests())
            stack.enter_context(mock.patch.object(torch.testing, "assert_close", assert_close))
        yield


def _usual_switches() -> None:
    """Float32 that is float32, and kernels as they are, whatever the test before asked for."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(False)


def assert_close(actual: Any, expected: Any, **options: Any) -> None:
    """`torch.testing.assert_close` for a GPU, whose float32 may differ by `FLOAT32`.

    Not where equal bits are asked for, and not for float64.
    """
    leaves = [leaf for leaf in tree_leaves(actual) if isinstance(leaf, Tensor)]
    exact = options.get("rtol") == options.get("atol") == 0
    if not exact and all(leaf.dtype != torch.float64 for leaf in leaves):
        for name, least in FLOAT32.items():
            options[name] = max(options.get(name, 0.0), least)
    _assert_close(actual, expected, **options)
