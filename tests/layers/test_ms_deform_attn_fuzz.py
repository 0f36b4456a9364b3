"""A hundred random problems; ``python -m tests.layers.fuzz --cases 2000`` runs more."""

import pytest

from co_detr.layers.deformable_attention import KERNEL_DEVICES
from tests.layers.fuzz import disagreement, make_problem

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("first", range(0, 100, 20))
@pytest.mark.parametrize("device", DEVICES)
def test_random_problems(device, first):
    if device not in KERNEL_DEVICES:
        pytest.skip(f"co_detr was installed without a kernel for {device}")
    for number in range(first, first + 20):
        problem = make_problem(number, device)
        wrong = disagreement(problem)
        assert wrong is None, f"{problem}: {wrong}"
