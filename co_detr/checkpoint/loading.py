"""Fits the weights of a file into a model: the one loader of training, prediction and analysis.

A file may hold a model of this project, one of the reference implementation, or only a backbone
from ImageNet training in several frameworks. Every tensor of it must be used and every one of the
model's must be in it, unless the caller allows for differences; `LoadReport` says what was done.
Class heads are carried over to another list of classes by `co_detr.checkpoint.classes`.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import Tensor, nn

from co_detr.checkpoint.classes import (
    NUM_LISTED,
    ClassMap,
    class_lines,
    match_stored_classes,
    remap_classes,
)
from co_detr.checkpoint.official import convert_official, is_official, rename_official
from co_detr.checkpoint.reading import plain_state, with_present_names
from co_detr.errors import CheckpointError
from co_detr.modeling import CoDETR
from co_detr.modeling.backbones.timm import TimmBackbone, pixel_mean, pixel_std
from co_detr.modeling.queries.sources import training_module_names

logger = logging.getLogger(__name__)

Mismatch = Literal["error", "by_name", "reset"]
Parts = Literal["any", "whole", "inference"]


def load_weights(
    model: nn.Module,
    content: Mapping[str, Any],
    path: str,
    *,
    parts: Parts = "any",
    mismatch: Mismatch = "error",
    class_names: Sequence[str] | None = None,
    class_sources: Mapping[str, str] | None = None,
    resuming: bool = False,
) -> LoadReport:
    """Loads the weights of a checkpoint into ``model``, which stays as it is if they do not fit.

    Args:
        model: the model.
        content: what the file holds, see `read_checkpoint` and `choose_weights`. Weights of the
            reference implementation are converted.
        path: of the file, for the report.
        parts: what the file must have. "any" allows for one with a backbone alone, which goes below
            the channel mapper (``backbone.bottom_up``; ``backbone`` if there is no mapper); "whole"
            is all that the model has; "inference" is for a model without the parts for training
            (`CoDETR.strip_auxiliary`), and leaves those of the file out.
        mismatch: what to do with a file that does not fit: "error"; "by_name" carries the rows of
            the class heads over by class name and refuses other differences; "reset" loads what
            fits and leaves the rest at its initial values.
        class_names: of the data, in order; None: not to be compared with those of the file.
        class_sources: with "by_name", of classes of the data that start from the rows of a class of
            another name, that name.
        resuming: whether a training goes on, for what the error advises.

    Raises:
        CheckpointError: if the file holds no weights, or they do not fit.
    """
    state = with_present_names(plain_state(content, path), model)
    report = LoadReport(os.path.basename(path), len(model.state_dict()))
    unknown: list[str] = []
    backbone_alone = False
    if is_official(content):
        if not isinstance(model, CoDETR):
            raise CheckpointError(
                "the checkpoint is one of the reference Co-DETR, but the model is a "
                f"{type(model).__name__}: choose a config of a Co-DETR model."
            )
        convert = convert_official if mismatch == "error" else rename_official
        conversion = convert(state, model)
        state, unknown = conversion.state_dict, conversion.unknown
        report.ignored = conversion.ignored
    elif parts == "inference":
        state = _without_training_parts(state, model)
    elif parts == "any" and _is_backbone(state, model):
        backbone_alone = True
        state = _backbone_state(state, content, model)
        report.scope, report.num_tensors = "backbone", len(state)
    if not backbone_alone:
        by_name = mismatch == "by_name"
        report.classes = match_stored_classes(content, class_names, path, by_name, class_sources)
        if report.classes is not None:
            remap_classes(state, model, report.classes)

    own = model.state_dict()
    wrong = [key for key, value in state.items() if key in own and value.shape != own[key].shape]
    # Beside a backbone, the model keeps its initial values: that is what such a file is for.
    # Not the missing keys that torch reports: frozen norms fill in absent statistics silently.
    missing = [] if backbone_alone else [key for key in own if key not in state]
    foreign = [key for key in state if key not in own]
    report.kept = [
        f"{key} is {tuple(state[key].shape)} in the file but {tuple(own[key].shape)} in the model"
        for key in wrong
    ]
    report.kept += [f"{key} is not in the file" for key in missing]
    report.unused = [*foreign, *unknown]
    if mismatch != "reset" and (report.kept or report.unused):
        # By turns, since only the first are told: each kind of them says something.
        foreign_too = [f"{key} is not in the model" for key in report.unused]
        turns = itertools.zip_longest(report.kept, foreign_too)
        problems = [problem for turn in turns for problem in turn if problem is not None]
        raise _mismatch_error(problems, _advice(model, missing, parts, resuming))
    if report.num_loaded == 0:
        raise _mismatch_error(
            [*report.kept, *report.unused],
            "not one tensor fits; choose the config of this checkpoint",
        )
    model.load_state_dict({key: state[key] for key in state if key not in wrong}, strict=False)
    return report


def timm_content(model: nn.Module, address: str) -> dict[str, Any]:
    """Weights of timm for the backbone of a model, in the form of a file with a backbone alone.

    Args:
        model: with a `TimmBackbone`.
        address: see `TimmBackbone.timm_weights`.

    Raises:
        CheckpointError: if the backbone is none of timm, the weights cannot be had, or the model
            normalizes images otherwise than these weights were trained with.
    """
    path = _backbone_path(model) if hasattr(model, "backbone") else ""
    backbone = model.get_submodule(path)
    if not isinstance(backbone, TimmBackbone):
        raise CheckpointError(
            f"{address} is for a backbone of timm, but that of the model is a "
            f"{type(backbone).__name__}: name a file in train.init_checkpoint."
        )
    weights = backbone.timm_weights(address)
    channels = model.pixel_mean.numel()
    for key, wanted in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
        ours, theirs = getattr(model, key).flatten(), wanted(backbone.name, channels)
        if not torch.allclose(ours.cpu(), torch.tensor(theirs), atol=0.1):
            raise CheckpointError(
                f"the weights {address} were trained on images that were normalized with the "
                f"{key} {[round(value, 3) for value in theirs]} (of 0 to 255, red first), but "
                f"model.{key} is {[round(value, 3) for value in ours.tolist()]}: leave model.{key} "
                "as configs/models/backbones.py sets it for timm, or set it to these values."
            )
    return {"model": {f"{path}.{key}": value for key, value in weights.items()}}


@dataclass
class LoadReport:
    """Attributes:
    file: where the tensors come from.
    num_tensors: of the model (parameters and buffers).
    scope: what the file is for, if not the whole model, such as "backbone".
    ignored: official keys that have no place here -> why.
    classes: how class heads were carried over, if they were.
    kept: tensors that keep their initial values, each with the reason.
    unused: tensors of the file that nothing was done with.
    """

    file: str
    num_tensors: int
    scope: str = ""
    ignored: Mapping[str, str] = field(default_factory=dict)
    classes: ClassMap | None = None
    kept: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    @property
    def num_loaded(self) -> int:
        return self.num_tensors - len(self.kept)

    @property
    def complete(self) -> bool:
        """Whether the file and the model had the same tensors and classes."""
        remapped = self.classes is not None and bool(self.classes.new or self.classes.unused)
        return not (self.kept or self.unused or remapped)

    def text(self) -> str:
        """The report, at most some twenty lines."""
        what = f"tensors of the {self.scope or 'model'}"
        lines = [f"{self.file}: {self.num_loaded} of {self.num_tensors} {what} loaded."]
        lines += ignored_lines(self.ignored)
        if self.classes is not None:
            lines += class_lines(self.classes)
        if self.kept:
            lines += [f"  {len(self.kept)} keep their initial values:", *_listed(self.kept)]
        if self.unused:
            lines += [f"  {len(self.unused)} of the file are not used:", *_listed(self.unused)]
        return "\n".join(lines)


def ignored_lines(ignored: Mapping[str, str]) -> list[str]:
    """One line per reason why official tensors were left out."""
    return [
        f"  {number} of the file left out: {reason}"
        for reason, number in Counter(ignored.values()).items()
    ]


def _advice(model: nn.Module, missing: Sequence[str], parts: Parts, resuming: bool) -> str:
    """What to do about a file that does not fit."""
    if parts != "any":
        return "choose the config that it was trained with"
    heads = {key for key in model.state_dict() if key.startswith("auxiliary.")}
    if heads and heads <= set(missing):
        advice = "the file has no auxiliary heads (it was stripped, or trained without): set "
        advice += "model.auxiliary=null to do without them, too, or "
    else:
        advice = "build the model with the settings it was trained with (such as "
        advice += "model.num_classes), or "
    if resuming:
        return advice + "start a new run with train.init_checkpoint set to the checkpoint"
    advice += "set train.init_checkpoint_mismatch=by_name to take class heads over by "
    return advice + "class name, or =reset to load only what fits"


def _without_training_parts(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What a stripped `model` has of a state dict of its whole model, or of a stripped one.

    Only auxiliary heads, query sources of training, and what a source of inference has for training
    are left out: anything else that does not fit has to be seen.
    """
    source = f"queries.{model.queries.inference}." if isinstance(model, CoDETR) else "queries."
    dropped = ("auxiliary.", *(f"{source}{name}." for name in training_module_names()))
    return {
        key: value
        for key, value in state.items()
        if not key.startswith(dropped)
        and (key.startswith(source) or not key.startswith("queries."))
    }


def _is_backbone(state: dict[str, Any], model: nn.Module) -> bool:
    """True if ``state`` has no tensor of ``model`` outside of the backbone."""
    if not hasattr(model, "backbone"):
        return False
    inside = f"{_backbone_path(model)}."
    outside = {key for key in model.state_dict() if not key.startswith(inside)}
    # The names of a model that was trained with other settings differ in their last parts only.
    outside_parts = {key.split(".")[0] for key in outside} - {"backbone"}
    return not any(key in outside or key.split(".")[0] in outside_parts for key in state)


def _backbone_state(
    state: Mapping[str, Tensor], content: Mapping[str, Any], model: nn.Module
) -> dict[str, Tensor]:
    """The tensors of a backbone file under the names that they have in ``model``.

    Args:
        state: the tensors.
        content: of the file; if it says ``matching_heuristics``, names of other frameworks, or of
            Caffe2 by its ``__author__``, are guessed.
        model: with a ``backbone``, perhaps below a channel mapper (``backbone.bottom_up``). What
            the backbone names in ``fresh_prefixes`` keeps its initial values if the file lacks it.

    Raises:
        CheckpointError: naming tensors that the file or the backbone lacks.
    """
    path = _backbone_path(model)
    backbone = model.get_submodule(path)
    own = backbone.state_dict()
    state = {
        key.removeprefix(f"{path}."): value
        for key, value in state.items()
        if key.removeprefix(f"{path}.") in own or not _is_left_out(key)
    }
    if content.get("matching_heuristics", False):
        from_caffe2 = content.get("__author__") == "Caffe2"
        state = align_and_update_state_dicts(own, state, c2_conversion=from_caffe2)
    missing = own.keys() - state.keys()
    if not any(_is_statistic(key) for key in state):
        # Norms that were folded into scale and shift come without statistics (Caffe2 models);
        # Detectron2's frozen norms then take mean 0 and variance 1.
        missing = {key for key in missing if not _is_statistic(key)}
    fresh = tuple(getattr(backbone, "fresh_prefixes", ()))
    missing = {key for key in missing if not key.startswith(fresh)} if fresh else missing
    problems = [f"{key} is not in the backbone" for key in sorted(state.keys() - own.keys())]
    problems += [f"{key} is not in the file" for key in sorted(missing)]
    if problems:
        raise _mismatch_error(
            problems,
            "use the backbone settings (model.backbone) that the file was made with, or the file "
            "that belongs to this config",
        )
    return {f"{path}.{key}": value for key, value in state.items()}


def _backbone_path(model: nn.Module) -> str:
    return "backbone.bottom_up" if hasattr(model.backbone, "bottom_up") else "backbone"


def _is_left_out(key: str) -> bool:
    """Classifiers (``fc``, Swin's ``head`` and last ``norm``), BatchNorm's counters and Swin's
    masks for one image size are no part of a detector's backbone."""
    parts = key.split(".")
    if parts[-1] in ("num_batches_tracked", "attn_mask") or parts[0] in ("head", "norm"):
        return True
    return any(part.startswith("fc") for part in parts) and "mlp" not in parts


def _is_statistic(key: str) -> bool:
    return key.endswith((".running_mean", ".running_var"))


def _mismatch_error(problems: list[str], remedy: str) -> CheckpointError:
    """The error of a checkpoint that does not fit: the first problems, and what to do."""
    shown = "; ".join(problems[:NUM_LISTED])
    if len(problems) > NUM_LISTED:
        shown += f"; and {len(problems) - NUM_LISTED} more"
    return CheckpointError(f"the checkpoint does not fit the model ({shown}): {remedy}.")


def _listed(entries: list[str]) -> list[str]:
    lines = [f"    {entry}" for entry in entries[:NUM_LISTED]]
    if len(entries) > NUM_LISTED:
        lines.append(f"    and {len(entries) - NUM_LISTED} more")
    return lines
