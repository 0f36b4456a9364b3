"""Models by name: configs, and released weights where they can be found.

from co_detr import model_zoo
cfg = model_zoo.get_config("co_detr_r50")
model = model_zoo.get("co_detr_r50", trained=True)

The configs lie beside the package's sources or inside of an installed package; weights are a given
path, or in a folder, or on the network. `choose_config` finds the name that a
state dict belongs to.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

import co_detr
from co_detr.checkpoint.fetching import fetch, local_file
from co_detr.checkpoint.official import misfits, rename_official
from co_detr.checkpoint.official_table import NO_AUXILIARY, NO_MASKS
from co_detr.checkpoint.reading import with_present_names
from co_detr.checkpoint.saving import Checkpointer
from co_detr.engine.config import config_files, load_config
from co_detr.errors import CheckpointError, ConfigError
from co_detr.model_zoo.table import ZOO, ZooEntry

__all__ = [
    "ZOO",
    "ZooEntry",
    "config_directory",
    "get",
    "get_checkpoint_url",
    "get_config",
    "list",
    "list_models",
    "resolve_checkpoint",
]

FOLDER_VARIABLE = "CO_DETR_CHECKPOINTS"  # of the environment
# Any decoder layer's class head tells the number of classes.
CLASS_BIAS = {True: "query_head.cls_branches.0.bias", False: "decoder.class_heads.0.bias"}


def get(
    name: str,
    trained: bool = False,
    device: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Builds a model of the zoo, in training mode as Detectron2's ``model_zoo.get`` does.

    Args:
        name: one of `list_models`.
        trained: load the weights that were released for it.
        device: where to put it; by default a GPU if there is one.
        checkpoint: a local file to load instead of the released one; implies ``trained``.

    Raises:
        ConfigError: if there is no such model.
        CheckpointError: if the weights cannot be found or do not fit.
    """
    model = instantiate(get_config(name).model)
    if trained or checkpoint is not None:
        Checkpointer(model).load(resolve_checkpoint(name, checkpoint))
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def list_models() -> list[str]:
    """Names of all models; ``ZOO[name]`` says more about each."""
    return [*ZOO]


def config_directory() -> Path:
    """The folder with the config files.

    Raises:
        ConfigError: if the installation lacks them.
    """
    package = Path(co_detr.__file__).parent
    # `pip install .` puts them into the package; a checkout has them at its top.
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "common" / "train.py").is_file():
            return folder
    raise ConfigError(
        f"the configs are neither in {package / 'configs'} nor in {package.parent / 'configs'}: "
        "install co_detr again."
    )


def config_file(name: str) -> Path:
    """The file of a model's config.

    Args:
        name: such as ``co_detr_r50``, with or without ``.py``; without the folder of its family.

    Raises:
        ConfigError: if there is no such file.
    """
    stem, known = name.removesuffix(".py"), config_files(config_directory())
    if stem not in known:
        near = difflib.get_close_matches(stem, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}."
        raise ConfigError(f"there is no model {name!r} in the zoo: {remedy}")
    return known[stem]


def get_config(name: str) -> DictConfig:
    """The complete config of a model: ``model``, ``dataloader``, ``optimizer``, ``train``, ...

    Raises:
        ConfigError: if there is no such model.
    """
    return load_config(str(config_file(name)))


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


def resolve_checkpoint(name: str, path: str | os.PathLike[str] | None = None) -> str:
    """A local file with the weights of a model, fetched if need be.

    That is ``path``, or if there is none $CO_DETR_CHECKPOINTS/<file name>, or what the address in
    the table leads to (see `co_detr.checkpoint.fetching`).

    Raises:
        ConfigError: if there is no such model.
        CheckpointError: if the file is nowhere; says which file to put where.
    """
    if path is not None:
        return local_file(path)
    entry = _released(name)
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder and (Path(folder) / entry.checkpoint).is_file():
        return str(Path(folder) / entry.checkpoint)
    if entry.url is not None:
        return fetch(entry.url, entry.sha256)
    where = folder if folder else f"a folder and set {FOLDER_VARIABLE} to that folder"
    raise CheckpointError(
        f"checkpoint {entry.checkpoint} of {entry.name} is not here and cannot be fetched by a "
        f"program: fetch it from {entry.page} and put it into {where}."
    )


def _released(name: str) -> ZooEntry:
    stem = config_file(name).stem
    entry = ZOO.get(stem)
    if entry is None or entry.checkpoint is None:
        raise CheckpointError(
            f"no weights were released for {name}: train it, or name a file of yours."
        )
    return entry


@dataclass(frozen=True)
class Choice:
    """A config that fits.

    Attributes:
        name: of the model in the zoo.
        num_classes: of the state dict, which may differ from the config's.
        same: other models whose tensors have the same names and shapes.
    """

    name: str
    num_classes: int
    same: list[str]


def empty_model(cfg: DictConfig) -> nn.Module:
    """The model of a config; its tensors have shapes, but no memory behind them."""
    with torch.device("meta"):
        return instantiate(cfg.model)


@functools.lru_cache(maxsize=2 * len(ZOO))
def _of_the_zoo(name: str, num_classes: int) -> nn.Module:
    """The empty model of a name, for reading; kept, as it takes a third of a second to make."""
    cfg = get_config(name)
    cfg.model.num_classes = num_classes
    return empty_model(cfg)


def choose_config(state: Mapping[str, Tensor], official: bool) -> Choice:
    """The first model of the zoo that takes all tensors of ``state``.

    Args:
        state: complete, without wrappers.
        official: whether the names are those of the reference, or ours.

    Raises:
        CheckpointError: if none does; names the nearest and what differs.
    """
    bias = state.get(CLASS_BIAS[official])
    if bias is None:
        kind = "a checkpoint of the reference" if official else "a checkpoint of co_detr"
        raise CheckpointError(
            f"this is not {kind} ({CLASS_BIAS[official]} is missing): name another file"
            f"{'' if official else ', or leave --reverse out'}."
        )
    problems: dict[str, list[str]] = {}
    # A plain DETR takes its part of any such file, and a model without masks that of one with them:
    # right only if nothing else fits. A config for another number of classes is right only if none
    # has the file's.
    rank: dict[str, tuple[bool, bool]] = {}
    for name, entry in ZOO.items():
        if entry.package is not None and find_spec(entry.package) is None:
            continue  # who made the file has it
        problems[name], partial = _problems(state, _of_the_zoo(name, len(bias)), official)
        rank[name] = (partial, get_config(name).model.num_classes != len(bias))
    fitting = sorted((name for name in rank if not problems[name]), key=rank.__getitem__)
    if not fitting:
        nearest = min(rank, key=lambda name: len(problems[name]))
        raise CheckpointError(
            f"no config of the zoo fits this checkpoint; the nearest is {nearest} "
            f"({len(problems[nearest])} differences: {_first(problems[nearest])}): pass the right "
            "one as --config-file."
        )
    chosen, *others = fitting
    same = [name for name in others if rank[name] == rank[chosen]]
    return Choice(chosen, len(bias), same)


def _problems(
    state: Mapping[str, Tensor], model: nn.Module, official: bool
) -> tuple[list[str], bool]:
    """What does not fit, and whether tensors were left out for want of auxiliary heads or masks."""
    partial, unknown = False, []
    if official:
        conversion = rename_official(state, model)
        state, unknown = conversion.state_dict, conversion.unknown
        partial = not {NO_AUXILIARY, NO_MASKS}.isdisjoint(conversion.ignored.values())
    else:
        state = with_present_names(state, model)
    kinds = {"unknown": unknown, **misfits(state, model)}
    return [f"{kind}: {entry}" for kind, entries in kinds.items() for entry in entries], partial


def _first(problems: Sequence[str]) -> str:
    return "; ".join(problems[:3])


list = list_models  # as Detectron2 calls it; last, as it hides Python's own
