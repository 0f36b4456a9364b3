"""Models by name: configs, and released weights where they can be found.

from co_detr import model_zoo
cfg = model_zoo.get_config("co_detr_r50")
model = model_zoo.get("co_detr_r50", trained=True)
"""

from __future__ import annotations

import os

import torch
from detectron2.config import instantiate
from torch import nn

from co_detr.checkpoint.saving import Checkpointer
from co_detr.model_zoo.finding import (
    config_directory,
    get_checkpoint_url,
    get_config,
    resolve_checkpoint,
)
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


list = list_models
