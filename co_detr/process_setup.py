"""What is set in a process before PyTorch is imported, or before it does anything large.

This file needs nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import logging
import os
import warnings

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
