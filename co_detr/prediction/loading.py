"""Builds a model for inference from a config and a checkpoint, which decides on the classes."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from co_detr.checkpoint import (
    convert_official,
    is_official,
    misfits,
    official_state_dict,
    shorten,
    stored_class_names,
    unwrap,
)
from co_detr.checkpoint_averaged import choose_weights
from co_detr.checkpoint_reading import read_checkpoint
from co_detr.checkpoint_report import mismatch_error
from co_detr.engine.config import apply_overrides, load_config
from co_detr.engine.overrides import text_override
from co_detr.errors import CheckpointError
from co_detr.model_zoo.choose import CLASS_BIAS
from co_detr.model_zoo.configs import config_file
from co_detr.model_zoo.files import existing_checkpoint, resolve_checkpoint
from co_detr.model_zoo.table import ZOO
from co_detr.modeling import CoDETR
from co_detr.modeling.detectors import DECODER
from co_detr.modeling.queries.source import training_module_names

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
    stored = stored_class_names(content)
    num_classes = _num_classes(content) or (len(stored) if stored else None)
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
        _require_heads(content, model, path)
    else:
        model.strip_auxiliary()
    model.load_state_dict(fitting_state(content, model, training_parts))
    names = _class_names(stored, cfg.model.num_classes, path)
    return Detector(model.eval().requires_grad_(False), names, cfg)


def read_weights(path: str, cfg: DictConfig, unsafe: bool = False) -> dict[str, Any]:
    """Content of a checkpoint; its ``model`` is the set of weights that ``cfg`` asks for.

    Raises:
        CheckpointError: if the file is unreadable or holds no weights.
    """
    weights = cfg.train.get("init_checkpoint_weights", "ema")
    content = choose_weights(read_checkpoint(path, unsafe), weights, path)
    _require_state(content, path)
    return content


def _read_config(config: Config, overrides: Sequence[str]) -> DictConfig:
    if isinstance(config, DictConfig):
        cfg = copy.deepcopy(config)
        apply_overrides(cfg, overrides)
        return cfg
    path = os.fspath(config)
    if _is_name(path):
        path = str(config_file(path))
    return load_config(path, overrides)


def _is_name(path: str) -> bool:
    """Whether it can only be the name of a model in the zoo."""
    return not (os.path.isfile(path) or os.path.dirname(path) or path.endswith((".yaml", ".yml")))


def _checkpoint_file(config: Config, checkpoint: str | os.PathLike[str] | None) -> str:
    if checkpoint is not None:
        return existing_checkpoint(checkpoint)
    name = None if isinstance(config, DictConfig) else Path(config).stem
    if name not in ZOO:
        raise CheckpointError(
            "no checkpoint is given, and weights are only released for models of the zoo: name "
            "the file that training wrote, such as output/run/model_final.pth."
        )
    return resolve_checkpoint(name)


def _require_state(content: Mapping[str, Any], path: str) -> None:
    state = unwrap(content)
    named = all(isinstance(key, str) for key in state)
    if not (state and named and all(isinstance(v, Tensor | np.ndarray) for v in state.values())):
        raise CheckpointError(
            f"checkpoint {path} holds no state dict: name a file that training wrote."
        )


def _require_heads(content: Mapping[str, Any], model: nn.Module, path: str) -> None:
    """Says of a stripped file what it is, instead of listing the tensors that it lacks."""
    heads = any(key.removeprefix("module.").startswith("auxiliary.") for key in unwrap(content))
    if getattr(model, "auxiliary", None) is None or heads or is_official(content):
        return
    missing = "they are"
    if model.evaluate_with not in (None, DECODER):
        missing = f"the detector {model.evaluate_with} is"
    raise CheckpointError(
        f"{path} has only the decoder, as its auxiliary heads were stripped, and {missing} needed "
        "here: name the file that training wrote, or leave the detector out."
    )


def _num_classes(content: Mapping[str, Any]) -> int | None:
    """As many as the class head of a decoder layer has rows; None: no such head."""
    state = unwrap(content)
    name = CLASS_BIAS[is_official(content)]
    bias = state.get(name, state.get(f"module.{name}"))
    return None if bias is None else len(bias)


def _class_names(stored: list[str] | None, num_classes: int, path: str) -> list[str]:
    if stored and len(stored) == num_classes:
        return stored
    found = f"names {len(stored)} classes" if stored else "does not say the names of its classes"
    logger.warning(
        '%s %s: its %d classes are called "class 0" and so on.', path, found, num_classes
    )
    return [f"class {index}" for index in range(num_classes)]


def fitting_state(
    content: Mapping[str, Any], model: nn.Module, training_parts: bool = False
) -> dict[str, Tensor]:
    """The weights for `model` under its names.

    Args:
        content: as `read_weights` gives it.
        model: has training-only parts if and only if `training_parts` is set.

    Raises:
        CheckpointError: if they do not fit.
    """
    if is_official(content):
        return convert_official(official_state_dict(content), model).state_dict
    plain = {
        key.removeprefix("module."): torch.as_tensor(each) for key, each in unwrap(content).items()
    }
    kept = plain if training_parts else without_training_parts(plain, model)
    problems = misfits(kept, model)
    if any(problems.values()):
        raise mismatch_error(
            [f"{kind}: {shorten(keys, 3)}" for kind, keys in problems.items() if keys],
            "choose the config that it was trained with",
        )
    return kept


def without_training_parts(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What a stripped `model` has of a state dict of its whole model, or of a stripped one.

    Only auxiliary heads, query sources of training, and what a source of inference has for training
    are left out: anything else that does not fit has to be seen.
    """
    source = f"queries.{getattr(model, 'inference_place', 0)}."
    if not any(key.startswith(source) for key in state):
        source = "queries.0."  # of a stripped model
    dropped = tuple(f"{source}{name}." for name in training_module_names())
    kept = {}
    for key, value in state.items():
        if key.startswith(source) and not key.startswith(dropped):
            kept["queries.0." + key.removeprefix(source)] = value
        elif not key.startswith(("auxiliary.", "queries.")):
            kept[key] = value
    return kept
