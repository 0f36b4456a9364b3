"""What is set up in a process around its work: messages and memory before it, signals during it.

Dependencies are silenced before they are imported, memory is set before anything large, and signals
that announce the end of a job stop a training where it can go on from. This file needs nothing but
the standard library.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import threading
import time
import warnings
from types import FrameType, TracebackType

# Detectron2 and fvcore use what newer releases of torch and setuptools deprecate.
DEPRECATIONS = (
    r"`torch\.jit\.",
    r"torch\.meshgrid: in an upcoming release",
    r".*pkg_resources is deprecated",
)
# Loggers that warn about tracing through deprecated checks and about machines without a GPU.
LOGGERS = ("torch.fx._symbolic_trace", "torch.utils.cpp_extension")
# Parameters of mallopt(3), as <malloc.h> numbers them.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
OTHER_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")
# What schedulers send some time before they kill a job.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# A scheduler may signal all processes of a job, and the launcher among them forwards it: the same
# signal then arrives twice.
_FORWARDED_WITHIN = 5.0


def silence_dependencies() -> None:
    """Silences messages of dependencies that a user of this project can do nothing about.

    To be called before Detectron2 is imported.
    """
    for message in DEPRECATIONS:
        warnings.filterwarnings("ignore", message=message)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def keep_freed_memory() -> bool:
    """Tells glibc to serve all buffers from a heap that never shrinks.

    glibc maps every large buffer from the system and gives it back when it is freed. A training
    step on the CPU frees and allocates gigabytes of activations: without this, a tenth to a third
    of its time is the system clearing the same pages again and again. The price is a tenth more
    memory.

    Call it once, before the first large allocation. Resident memory then stays at its peak until
    the process ends. Nothing is changed where a user has chosen otherwise: by ``MALLOC_*``
    variables, by ``GLIBC_TUNABLES`` for malloc, or by preloading another allocator.

    Returns:
        Whether the setting is in force; False on systems without glibc and for such users.
    """
    if _user_has_chosen() or not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # No buffer is a mapping of its own, and -1 is the largest threshold: never give back.
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def _user_has_chosen() -> bool:
    preloaded = os.environ.get("LD_PRELOAD", "")
    return (
        any(name.startswith("MALLOC_") for name in os.environ)
        or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
        or any(name in preloaded for name in OTHER_ALLOCATORS)
    )


def _is_glibc() -> bool:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") is not None
    except (AttributeError, ValueError, OSError):  # no such function or name: not glibc
        return False


class StopSignals:
    """Inside the block, the first SIGTERM or SIGUSR1 is noted; a second one acts as usual.

    Ctrl-C raises `KeyboardInterrupt` as ever, but cannot get lost: where it strikes in a callback,
    Python prints and forgets it, and a library that is writing a file makes another error of it.
    The trainer looks at `received` and `interrupted` once per iteration. In a thread that cannot
    handle signals the block does nothing.

    Args:
        has_launcher: a launcher forwards signals: what arrives in the next seconds is the first.

    Raises:
        KeyboardInterrupt: at the end of the block, whatever ended it, if Ctrl-C was pressed.
    """

    def __init__(self, has_launcher: bool = False) -> None:
        self.received = False
        self.interrupted = False
        self._patience = _FORWARDED_WITHIN if has_launcher else 0.0
        self._first = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {stop: signal.signal(stop, self._note) for stop in SIGNALS}
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for stop, handler in self._before.items():
            signal.signal(stop, handler)
        if self.interrupted and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        now = time.monotonic()
        if not self.received:
            self.received, self._first = True, now
            _say(f"{name}: stopping after this iteration and its checkpoint; once more: at once.")
        elif now - self._first >= self._patience:
            _say(f"{name} again: stopping at once; --resume continues from the last checkpoint.")
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def outlive_signals(worker_id: int = 0) -> None:
    """`worker_init_fn` of a DataLoader: its process heeds SIGTERM from the trainer alone.

    Schedulers signal all processes of a job, but the trainer needs its loading workers to finish
    the iteration. It ends them itself, by SIGTERM, too.
    """
    # Handlers are not told who sent a signal; whoever waits for it is.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    while True:
        received = signal.sigwaitinfo(SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == trainer.pid:
            os._exit(0)


def _say(text: str) -> None:
    # Not through a buffered stream, which the signal may have interrupted in a write.
    os.write(2, f"{text}\n".encode())
