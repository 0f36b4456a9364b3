"""A tiny COCO-format data set and a config for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from co_detr.engine.config import load_config
from tests.device import CHILD, EXACT, NAME
from tests.engine.processes import CONFIG_FILE, Finished, TrainNet, free_port
from tests.engine.tiny_data import TinyData, make_tiny_data
from tests.paths import python_path

ROOT = Path(__file__).resolve().parents[2]


def on(device: str) -> list[str]:
    """Overrides for a training there."""
    return [f"train.device={device}", *(EXACT if device == "cuda" else [])]


@pytest.fixture
def tiny_data(tmp_path: Path) -> TinyData:
    return make_tiny_data(tmp_path)


@pytest.fixture
def tiny_cfg(tiny_data: TinyData, tmp_path: Path):
    """Makes a config; arguments are overrides."""

    def make(*overrides: str, output: str = "out"):
        common = [*tiny_data.overrides(tmp_path / output), *on(NAME)]
        return load_config(CONFIG_FILE, [*common, *overrides])

    return make


@pytest.fixture
def train_net():
    """Runs train_net.py to its end; arguments are those behind `--config-file`."""
    started = []

    def run(*arguments: str, **settings) -> Finished:
        started.append(TrainNet([*on(CHILD), *arguments], **settings))
        return started[-1].finish()

    yield run
    for process in started:
        process.kill()


@pytest.fixture
def launch():
    """Starts two processes of train_net.py as a user does: by torchrun or by `--num-gpus`.

    Slow, as each of them imports everything; `two` is enough where the start is not the point.
    """

    def run(launcher: str, *arguments: str):
        command = [sys.executable]
        if launcher == "torchrun":
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        else:
            arguments = ("--num-gpus", "2", *arguments)
        return subprocess.run(
            [*command, str(ROOT / "train_net.py"), "--config-file", CONFIG_FILE]
            + [*on("cpu"), *arguments],  # NCCL wants a card for each
            capture_output=True,
            text=True,
            timeout=300,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
        )

    return run


@pytest.fixture
def train_process(tiny_data: TinyData, tmp_path: Path):
    """Starts train_net.py in a process that a test may signal; arguments are those of train_net.

    With `rank`, as one of two processes, like torchrun.
    """
    started = []

    def start(*arguments: str, output: str = "out", **settings) -> TrainNet:
        device = CHILD if settings.get("rank") is None else "cpu"
        common = [*tiny_data.overrides(tmp_path / output), *on(device)]
        started.append(TrainNet([*common, *arguments], **settings))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def two(train_process):
    """Starts two processes that train together, as torchrun would."""

    def start(*arguments, **settings):
        port = free_port()
        return [train_process(*arguments, rank=rank, port=port, **settings) for rank in (0, 1)]

    return start
