"""Keeps two calls from training in the same folders."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from co_detr.errors import ConfigError

_LOCK_FILE = ".ablate.lock"


@contextmanager
def exclusive(output_dir: Path) -> Iterator[int]:
    """Yields a descriptor of a lock, which is free when all processes that have it have ended.

    Trainings outlive an ablate.py that is killed; no other may be started in their folders.

    Raises:
        ConfigError: if it is not free.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / _LOCK_FILE, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"trainings of another call still write to {output_dir}: wait until they end, or "
                "choose another --output-dir."
            ) from None
        yield file.fileno()
