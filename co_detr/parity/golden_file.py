"""Golden files: nested dicts, lists and tensors, as ``.pt`` or as xz-compressed ``.pt.xz``."""

from __future__ import annotations

import io
import lzma
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUFFIXES = (".pt", ".pt.xz")


def golden_files(directory: Path) -> list[Path]:
    """All golden files of a folder, by name."""
    return sorted(p for p in directory.iterdir() if p.is_file() and p.name.endswith(SUFFIXES))


def find_golden(directory: Path, stem: str) -> Path:
    """The file ``<stem>.pt`` or ``<stem>.pt.xz`` of a folder.

    Raises:
        FileNotFoundError: naming both.
    """
    for suffix in SUFFIXES:
        if (path := directory / f"{stem}{suffix}").exists():
            return path
    raise FileNotFoundError(
        f"{directory} holds neither {stem}.pt nor {stem}.pt.xz; copy the file that belongs to it."
    )


def of_instance_segmentation(path: Path) -> bool:
    """Whether the file is of the reference's instance segmentation, which this project lacks."""
    return re.match("(case|units)_M", path.name) is not None


def load_golden(path: Path) -> dict[str, Any]:
    """The content of a golden file; no code in it is run."""
    content = path.read_bytes()
    if path.name.endswith(".xz"):
        content = lzma.decompress(content)
    return torch.load(io.BytesIO(content), weights_only=True)


def save_golden(content: dict[str, Any], path: Path) -> None:
    """Writes ``content``, compressed if the name ends in ``.xz``."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    path.write_bytes(lzma.compress(data, preset=9) if path.name.endswith(".xz") else data)


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested dicts, lists and tuples by dotted name; lists of numbers are leaves."""
    if isinstance(value, dict):
        items = [(f"{name}.{key}" if name else str(key), each) for key, each in value.items()]
    elif isinstance(value, list | tuple) and any(_nested(each) for each in value):
        items = [(f"{name}[{index}]", each) for index, each in enumerate(value)]
    else:
        return {name: value}
    return {leaf: each for key, inner in items for leaf, each in flatten(inner, key).items()}


def _nested(value: Any) -> bool:
    return isinstance(value, Tensor | dict | list | tuple)
