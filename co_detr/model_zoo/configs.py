"""Finds the config files, beside the package's sources or inside of an installed package."""

from __future__ import annotations

import difflib
from pathlib import Path

from omegaconf import DictConfig

import co_detr
from co_detr.engine.config import load_config
from co_detr.errors import ConfigError


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
        name: such as ``co_detr_r50``, with or without ``.py``.

    Raises:
        ConfigError: if there is no such file.
    """
    folder, stem = config_directory(), name.removesuffix(".py")
    known = sorted(path.stem for path in folder.glob("*.py"))
    if stem not in known:
        near = difflib.get_close_matches(stem, known, n=1)
        mend = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}."
        raise ConfigError(f"there is no model {name!r} in the zoo: {mend}")
    return folder / f"{stem}.py"


def get_config(name: str) -> DictConfig:
    """The complete config of a model: ``model``, ``dataloader``, ``optimizer``, ``train``, ...

    Raises:
        ConfigError: if there is no such model.
    """
    return load_config(str(config_file(name)))
