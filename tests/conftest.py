"""Settings shared by all tests."""

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # More threads than this only slow the tiny models of the tests down.
    torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
