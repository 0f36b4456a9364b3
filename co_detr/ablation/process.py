"""One training as a process of its own, with what it took."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from co_detr.errors import ConfigError

TRAIN_NET = Path(__file__).resolve().parents[2] / "train_net.py"
LOG_FILE = "log_ablate.txt"

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@dataclass(frozen=True)
class ProcessEnd:
    """How a process ended; see `AttemptEnd`."""

    exit_code: int
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int


class TrainingProcess:
    """A running train_net.py, whose output goes to the end of `folder`/log_ablate.txt.

    It has a process group of its own, so that Ctrl-C in a terminal does not reach it: it stops
    when `stop` asks it to. On Linux it is asked to stop, too, when this process dies.

    Args:
        arguments: of train_net.py.
        folder: of the run; exists.
        environment: variables in addition to those of this process.
        held_open: file descriptor that the process keeps as long as it lives.

    Raises:
        ConfigError: if train_net.py is not beside the package.
    """

    def __init__(
        self, arguments: Sequence[str], folder: Path, environment: dict[str, str], held_open: int
    ) -> None:
        if not TRAIN_NET.is_file():
            raise ConfigError(
                f"{TRAIN_NET} does not exist: an ablation needs the repository; install the "
                "package from it with pip install -e ."
            )
        self._log = folder / LOG_FILE
        with open(self._log, "ab") as log:
            self._log_start = log.tell()
            self._start = time.monotonic()
            self._process = subprocess.Popen(
                [sys.executable, str(TRAIN_NET), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                pass_fds=(held_open,),
                start_new_session=True,
                preexec_fn=_end_with_parent(),
            )

    def poll(self) -> ProcessEnd | None:
        """What it took, or None as long as it runs; not to be called again after it has ended."""
        pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
        if pid == 0:
            return None
        self._process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen knows, too
        return ProcessEnd(
            exit_code=self._process.returncode,
            wall_seconds=time.monotonic() - self._start,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            # Linux counts in KiB, macOS in bytes.
            peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        )

    def stop(self) -> None:
        """The first call lets the training save, as train_net.py has it; a second one does not."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGTERM)

    def last_words(self) -> str:
        """What this process has said about its failure: its error, or its last line."""
        with open(self._log, "rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or ["it said nothing"])[-1]


def _end_with_parent() -> Callable[[], object] | None:
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # loaded here: little is safe between fork and exec
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
