"""Settings shared by all tests."""

import os
import pickle
from functools import cache
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig

from tests import device
from tests.paths import ROOT

# Whose tests get the marker `tools`: what they test stands around the core, as co_detr/tools and
# the programs in tools/ and scripts/ do. ``pytest -m "not tools"`` tests the core.
TOOLS = (
    *("ablation", "analysis", "coco_files", "conversion", "export", "mutations", "prediction"),
    "quickstart",
    *(
        "checkpoint/test_average_checkpoints.py",
        "checkpoint/test_convert_tool.py",
        "engine/test_complexity.py",
    ),
    *("engine/test_inspect_data.py", "parity/test_report.py", "test_help.py"),
)


_load = LazyConfig.load


@cache
def _content(path: Path) -> bytes:
    return pickle.dumps(_load(str(path)))


def load_once(path: str, *keys: object) -> object:
    """``LazyConfig.load`` that reads each config of the repository once, which takes 0.1 s."""
    full = Path(path).resolve()
    if keys or full.suffix != ".py" or not full.is_relative_to(ROOT):
        return _load(path, *keys)
    return pickle.loads(_content(full))


def pytest_configure(config: pytest.Config) -> None:
    LazyConfig.load = load_once
    if device.DEVICE.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("TEST_DEVICE=cuda, but PyTorch finds no GPU here.")
    # More threads than this only slow the tiny models of the tests down. Test processes share them.
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, min(2, torch.get_num_threads()) // processes))
    # Comparisons with the CPU need float32 that is float32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@cache
def is_of_tools(path: Path) -> bool:
    return any(path.is_relative_to(device.TESTS / name) for name in TOOLS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if is_of_tools(item.path):
            item.add_marker("tools")
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            if not device.can_be_emulated(item):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if device.ON_CPU:
            continue
        if not device.has_device(item.path):
            item.add_marker(pytest.mark.skip(reason="nothing in it is computed on a device"))
        elif (cpu_only := item.get_closest_marker("cpu_only")) is not None:
            item.add_marker(pytest.mark.skip(reason=f"on the CPU only: {cpu_only.args[0]}"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    with device.running(collector.path):  # for constants of modules
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    with device.running(item.path):
        return (yield)
