"""Tests for a machine with a GPU: what the CPU cannot say, and whether both say the same.

Those that take `device` need no card of NVIDIA's: ``TEST_DEVICE=emulated`` rehearses them.
"""

import pytest
import torch

from tests.device import DEVICE


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else DEVICE


@pytest.fixture(autouse=True)
def float32_and_nothing_less():
    """TF32 would be off by more than what these tests are to find."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
