"""Files that are either whole or not there, whenever the process or the machine stops."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import IO, Any

INCOMPLETE = ".incomplete"

# Some network file systems cannot flush a folder.
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP)


@contextmanager
def written_whole(path: str, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path`; at the end of the block it becomes `path`.

    The content is on the disk before the name is, and the name before this returns: a process
    that is killed, or a machine that loses power, leaves the former file or the new one. If the
    block fails, the former file stays and the temporary one is removed.

    Args:
        path: the file to write or replace.
        mode: "w" (UTF-8) or "wb".

    Raises:
        OSError: if it cannot be written.
    """
    temporary = f"{path}{INCOMPLETE}"
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(temporary, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    _flush_folder(os.path.dirname(path) or ".")


def remove_incomplete(folder: str) -> list[str]:
    """Removes what a killed process left half written in `folder`; returns the names."""
    paths = glob.glob(os.path.join(glob.escape(folder), f"*{INCOMPLETE}"))
    for path in paths:
        os.remove(path)
    return sorted(os.path.basename(path) for path in paths)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal; reads it piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_error_of(error: BaseException) -> OSError | None:
    """The operating system's error behind `error`, which other code may have wrapped.

    `torch.save` raises a RuntimeError about an unexpected position where a disk is full.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _flush_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


def time_stamp() -> str:
    """Date and time with its zone, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
