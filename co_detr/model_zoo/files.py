"""Finds the files of released weights: a given path, a folder, the cache, or the network."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.error import URLError

import torch

from co_detr.errors import CheckpointError
from co_detr.model_zoo.configs import config_file
from co_detr.model_zoo.table import ZOO, ZooEntry

FOLDER_VARIABLE = "CO_DETR_CHECKPOINTS"


def get_checkpoint_url(name: str) -> str:
    """Where a program can fetch the weights of a model.

    Raises:
        ConfigError: if there is no such model.
        CheckpointError: if there is no such address; says where a person can fetch the file.
    """
    entry = _released(name)
    if entry.url is None:
        raise CheckpointError(
            f"the weights of {name} cannot be fetched by a program: fetch {entry.checkpoint} from "
            f"{entry.page} with a browser."
        )
    return entry.url


def existing_checkpoint(path: str | os.PathLike[str]) -> str:
    """The path of a file that is there.

    Raises:
        CheckpointError: if there is no such file.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"checkpoint {path} does not exist: name an existing file.")
    return os.fspath(path)


def resolve_checkpoint(name: str, path: str | os.PathLike[str] | None = None) -> str:
    """A local file with the weights of a model, fetched if need be.

    Looks at ``path``, or if there is none at $CO_DETR_CHECKPOINTS/<file name>, then in torch's
    cache, then at the address in the table. What is fetched has to have the checksum of the table.

    Raises:
        ConfigError: if there is no such model.
        CheckpointError: if the file is nowhere; says which file to put where.
    """
    if path is not None:
        return existing_checkpoint(path)
    entry = _released(name)
    folder = os.environ.get(FOLDER_VARIABLE)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / f"co_detr_{entry.checkpoint}"
    for candidate in ([Path(folder) / entry.checkpoint] if folder else []) + [cached]:
        if candidate.is_file():
            return str(candidate)
    if entry.url is None:
        raise _absent(entry, "is not here and cannot be fetched by a program")
    cached.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(entry.url, str(cached), hash_prefix=entry.sha256)
    except RuntimeError as error:  # another checksum
        raise _absent(entry, f"at {entry.url} is another file than it was ({error})") from error
    except (URLError, OSError) as error:
        raise _absent(entry, f"cannot be fetched from {entry.url} ({error})") from error
    return str(cached)


def _released(name: str) -> ZooEntry:
    stem = config_file(name).stem
    entry = ZOO.get(stem)
    if entry is None or entry.checkpoint is None:
        raise CheckpointError(
            f"no weights were released for {name}: train it, or name a file of yours."
        )
    return entry


def _absent(entry: ZooEntry, what: str) -> CheckpointError:
    folder = os.environ.get(FOLDER_VARIABLE)
    where = folder if folder else f"a folder and set {FOLDER_VARIABLE} to that folder"
    return CheckpointError(
        f"checkpoint {entry.checkpoint} of {entry.name} {what}: fetch it from {entry.page} and put "
        f"it into {where}."
    )
