"""train_net.py in processes of their own that can be signaled and killed.

They are forked from a server that has imported everything, so that each starts at once.
"""

import functools
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path

from co_detr.engine.launch import Job
from tests.paths import python_path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG_FILE = str(HERE / "tiny_config.py")
SECONDS = 180  # that nothing in these tests should take, even on a busy machine

_SERVER = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Finished:
    """How a program ended: its exit code, and what it said on stdout and stderr."""

    returncode: int
    output: str

    def errors(self, start: str = "error: ") -> list[str]:
        """The lines that say what was wrong."""
        return [line for line in self.output.splitlines() if line.startswith(start)]


class TrainNet:
    """A running train_net.py.

    Args:
        arguments: behind `--config-file`.
        rank: of two processes, if not None; both need the same `port`.
        port: see `free_port`.
        prepare: runs in the process first; has to be importable.
        config: the config file.
        command: of `co_detr.command_line`, which has to take `--config-file`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        rank: int | None = None,
        port: int = 0,
        prepare: Callable[[], None] | None = None,
        config: str = CONFIG_FILE,
        command: str = "train",
    ) -> None:
        environment = {} if rank is None else one_of_two(rank, port)
        _start_server()
        self._said = tempfile.NamedTemporaryFile("r", prefix="train_net")
        arguments = ["--config-file", config, *arguments]
        self._process = _SERVER.Process(
            target=_run, args=(command, arguments, environment, self._said.name, prepare)
        )
        self._process.start()

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return Path(self._said.name).read_text()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def wait(self) -> int:
        """The exit code; minus the signal that ended it."""
        self._process.join(SECONDS)
        assert not self.is_running, f"it hangs: {self.output}"
        return self._process.exitcode

    def finish(self) -> Finished:
        return Finished(self.wait(), self.output)

    def wait_until(self, happened: Callable[[], bool], interval: float = 0.01) -> bool:
        """Whether it happened before the process ended."""
        end = time.monotonic() + SECONDS
        while not happened():
            if not self.is_running:
                return False
            assert time.monotonic() < end, f"it hangs: {self.output}"
            time.sleep(interval)
        return True


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def one_of_two(rank: int, port: int) -> dict[str, object]:
    """The environment that torchrun gives a process; both need the same `port`."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    return ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def run_two(target: Callable[..., None], *arguments: object) -> None:
    """Calls `target` in two processes that find each other as under torchrun.

    Raises:
        AssertionError: if one of them fails; it has said why on stderr.
    """
    _start_server()
    port = free_port()
    processes = [
        _SERVER.Process(target=_call, args=(one_of_two(rank, port), target, arguments))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(SECONDS)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()


def _call(
    environment: dict[str, object], target: Callable[..., None], arguments: Sequence[object]
) -> None:
    os.environ.update({key: str(value) for key, value in environment.items()})
    target(*arguments)


def fork_processes_of_num_gpus() -> None:
    """For `prepare`: the processes of `--num-gpus` need not import everything once more."""
    from torch import multiprocessing as mp

    mp.start_processes = functools.partial(mp.start_processes, start_method="fork")


def _start_server() -> None:
    before = dict(os.environ)
    os.environ.update(PYTHONPATH=python_path(), OMP_NUM_THREADS="1")
    try:
        _SERVER.set_forkserver_preload(["train_net", "co_detr.engine.train", __name__])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(
    command: str,
    arguments: list[str],
    environment: dict[str, object],
    output: str,
    prepare: Callable[[], None] | None,
) -> None:
    said = os.open(output, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(said, descriptor)
    os.environ.update({key: str(value) for key, value in environment.items()})
    multiprocessing.set_start_method("fork", force=True)  # of its loading workers, as usual
    if prepare is not None:
        prepare()
    from co_detr.command_line import start

    sys.argv = [f"{command}.py", *arguments]
    sys.exit(start(command))


def job_of(main: Callable[[], object]) -> Job:
    """A training that does this, in one process."""
    return Job(
        main=main,
        program="train_net.py",
        device="cpu",
        device_option="train.device=",
        patience=timedelta(minutes=1),
        debug=False,
        goes_on="continue with --resume",
        interrupted="--resume continues from the last checkpoint",
        kept="checkpoints",
    )
