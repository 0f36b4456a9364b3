"""Reading text files and lists of class names."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

from co_detr.errors import DataError


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, or of a UTF-16 file with a byte order mark, without the mark.

    Raises:
        DataError: if it cannot be read, or is in another encoding.
    """
    try:
        content = path.read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path} is not UTF-8 (byte 0x{byte:02x}): save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): correct the path.") from error


def read_class_names(path: Path) -> list[str]:
    """One name per line.

    Raises:
        DataError: if the file cannot be read, or the names are not unique.
    """
    lines = [line.strip() for line in read_text(path).splitlines()]
    return unique_names([line for line in lines if line], path)


def unique_names(names: Sequence[str], source: Path) -> list[str]:
    """Raises a DataError if there are no names, or one occurs twice."""
    repeated = [name for index, name in enumerate(names) if name in names[:index]]
    if repeated:
        raise DataError(f"{source} has the class {repeated[0]} twice: make the names unique.")
    if not names:
        raise DataError(f"{source} names no classes: add them.")
    return list(names)
