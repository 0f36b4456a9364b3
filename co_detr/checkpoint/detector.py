"""Builds a model for inference from a config and a checkpoint, which decides on the classes."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import nn

from co_detr.checkpoint.fetching import local_file
from co_detr.checkpoint.loading import load_weights
from co_detr.checkpoint.official import is_official
from co_detr.checkpoint.reading import (
    choose_weights,
    plain_state,
    read_checkpoint,
    stored_class_names,
)
from co_detr.engine.config import apply_overrides, load_config
from co_detr.engine.overrides import text_override
from co_detr.errors import CheckpointError
from co_detr.model_zoo import (
    CLASS_BIAS,
    resolve_checkpoint,
)
from co_detr.model_zoo.table import ZOO
from co_detr.modeling import CoDETR
from co_detr.modeling.detectors import DECODER

logger = logging.getLogger(__name__)

Config = str | os.PathLike[str] | DictConfig


@dataclass(frozen=True)
class Detector:
    """A model in eval mode, without what it does not need to detect, unless that was asked for.

    Attributes:
        model: on the CPU. One detector of it detects, the one that `cfg.model.evaluate_with` names;
            nothing is compared with it.
        class_names: one per class of the model, in order.
        cfg: the complete config that the model was built from.
    """

    model: nn.Module
    class_names: list[str]
    cfg: DictConfig


def load_detector(
    config: Config,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    detector: str | None = None,
    overrides: Sequence[str] = (),
    unsafe: bool = False,
    training_parts: bool = False,
) -> Detector:
    """Builds the model of a config with the classes of a checkpoint, and loads its weights.

    Args:
        config: a name of the model zoo, a config file (also the config.yaml of a run), or a
            loaded config.
        checkpoint: a file that training wrote or a released one; by default the weights released
            for the model. Of a file with averaged weights these are used, unless the config has
            train.init_checkpoint_weights="raw".
        detector: which one of the model, as "decoder", "roi", "merged" or "cascade" (see
            `co_detr.modeling.detectors`); None: model.evaluate_with of the config, by default the
            decoder, for which the auxiliary heads are left out.
        overrides: ``key=value`` for the config.
        unsafe: let the file run code while it is read.
        training_parts: keep the auxiliary heads and the query sources of training, for analysis.

    Raises:
        ConfigError: if there is no such config or key.
        CheckpointError: if the file is missing, unreadable or does not fit the config, or was
            stripped of the heads that the detector needs.
    """
    cfg = _read_config(config, overrides)
    if detector is not None:
        apply_overrides(cfg, [text_override("model.evaluate_with", detector)])
    path = _checkpoint_file(config, checkpoint)
    content = read_weights(path, cfg, unsafe)
    state = plain_state(content, path)
    stored = stored_class_names(content)
    bias = state.get(CLASS_BIAS[is_official(state)])
    num_classes = len(stored or ()) if bias is None else len(bias)
    if num_classes and num_classes != cfg.model.num_classes:
        logger.warning(
            "%s has %d classes, the config %d: the model is built for %d.",
            *(path, num_classes, cfg.model.num_classes, num_classes),
        )
        cfg.model.num_classes = num_classes
    model = instantiate(cfg.model)
    if isinstance(model, CoDETR):
        model.compare_detectors = model.compare_top_k = False  # only evaluations read it
    # Without a decoder an auxiliary head is the detector.
    training_parts = training_parts or getattr(model, "decoder", None) is None
    training_parts = training_parts or getattr(model, "evaluate_with", None) not in (None, DECODER)
    if training_parts:
        _require_heads(state, model, path)
    else:
        model.strip_auxiliary()
    load_weights(model, content, path, parts="whole" if training_parts else "inference")
    names = _class_names(stored, cfg.model.num_classes, path)
    return Detector(model.eval().requires_grad_(False), names, cfg)


def read_weights(path: str, cfg: DictConfig, unsafe: bool = False) -> dict[str, Any]:
    """Content of a checkpoint; its ``model`` is the set of weights that ``cfg`` asks for.

    Raises:
        CheckpointError: if the file is unreadable.
    """
    weights = cfg.train.get("init_checkpoint_weights", "ema")
    return choose_weights(read_checkpoint(path, unsafe), weights, path)


def _read_config(config: Config, overrides: Sequence[str]) -> DictConfig:
    if isinstance(config, DictConfig):
        cfg = copy.deepcopy(config)
        apply_overrides(cfg, overrides)
        return cfg
    return load_config(os.fspath(config), overrides)


def _checkpoint_file(config: Config, checkpoint: str | os.PathLike[str] | None) -> str:
    if checkpoint is not None:
        return local_file(checkpoint)
    name = None if isinstance(config, DictConfig) else Path(config).stem
    if name not in ZOO:
        raise CheckpointError(
            "no checkpoint is given, and weights are only released for models of the zoo: name "
            "the file that training wrote, such as output/run/model_final.pth."
        )
    return resolve_checkpoint(name)


def _require_heads(state: Mapping[str, Any], model: nn.Module, path: str) -> None:
    """Says of a stripped file what it is, instead of listing the tensors that it lacks."""
    heads = any(key.startswith("auxiliary.") for key in state)
    if getattr(model, "auxiliary", None) is None or heads or is_official(state):
        return
    missing = "they are"
    if model.evaluate_with not in (None, DECODER):
        missing = f"the detector {model.evaluate_with} is"
    raise CheckpointError(
        f"{path} has only the decoder, as its auxiliary heads were stripped, and {missing} needed "
        "here: name the file that training wrote, or leave the detector out."
    )


def _class_names(stored: list[str] | None, num_classes: int, path: str) -> list[str]:
    if stored and len(stored) == num_classes:
        return stored
    found = f"names {len(stored)} classes" if stored else "does not say the names of its classes"
    logger.warning(
        '%s %s: its %d classes are called "class 0" and so on.', path, found, num_classes
    )
    return [f"class {index}" for index in range(num_classes)]
