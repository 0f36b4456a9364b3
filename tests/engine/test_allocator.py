"""Memory that a step frees stays with the process, unless the user has chosen otherwise."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ALLOCATOR = Path(__file__).resolve().parents[2] / "co_detr" / "process_setup.py"
# Frees buffers of 64 MiB, above every threshold that glibc chooses itself, again and again.
PROGRAM = f"""
import ctypes, resource, runpy
kept = runpy.run_path({str(ALLOCATOR)!r})["keep_freed_memory"]()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    buffer = libc.malloc(64 << 20)
    libc.memset(buffer, 1, 64 << 20)
    libc.free(buffer)
use()
before = faults()
for _ in range(4):
    use()
print(kept, faults() - before)
"""
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def run(**variables: str) -> tuple[bool, int]:
    """What `keep_freed_memory` returned in a new process, and page faults of four reuses."""
    unset = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=clean | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@on_glibc
def test_freed_memory_is_not_faulted_in_again():
    kept, faults = run()
    assert kept
    assert faults < 100  # one buffer alone is 16384 pages of 4 KiB, or 32 of 2 MiB


@on_glibc
@pytest.mark.parametrize(
    "variables",
    [
        {"MALLOC_ARENA_MAX": "2"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000000"},
        {"LD_PRELOAD": "libjemalloc-that-is-not-here.so"},
    ],
)
def test_a_choice_of_the_user_is_respected(variables):
    kept, _ = run(**variables)
    assert not kept


def test_other_systems_are_left_alone(monkeypatch):
    from co_detr import process_setup

    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "confstr", lambda name: None)
    assert not process_setup.keep_freed_memory()
