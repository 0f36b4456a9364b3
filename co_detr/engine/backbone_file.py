"""Files that hold only a backbone, from ImageNet training in several frameworks."""

from __future__ import annotations

from typing import Any

from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import Tensor, nn

from co_detr.checkpoint_report import mismatch_error


def is_backbone(state: dict[str, Any], model: nn.Module) -> bool:
    """True if ``state`` has no tensor of ``model`` outside of the backbone."""
    if not hasattr(model, "backbone"):
        return False
    inside = f"{_backbone_path(model)}."
    outside = {key for key in model.state_dict() if not key.startswith(inside)}
    # The names of a model that was trained with other settings differ in their last parts only.
    outside_parts = {key.split(".")[0] for key in outside} - {"backbone"}
    return not any(key in outside or key.split(".")[0] in outside_parts for key in state)


def backbone_state(checkpoint: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a backbone file under the names that they have in ``model``.

    Args:
        checkpoint: ``model`` (the tensors), and of Detectron2's files ``__author__`` and
            ``matching_heuristics``, which is removed: other frameworks' names are guessed here.
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
        for key, value in checkpoint["model"].items()
        if not _is_left_out(key)
    }
    if checkpoint.pop("matching_heuristics", False):
        from_caffe2 = checkpoint.get("__author__") == "Caffe2"
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
        raise mismatch_error(
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
