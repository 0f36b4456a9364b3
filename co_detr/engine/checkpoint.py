"""Checkpoints: written whole or not at all, read strictly, backbones from several formats."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import IO, Any, NoReturn, cast

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import Tensor, nn

from co_detr.checkpoint import convert_official, is_official, official_state_dict
from co_detr.errors import CheckpointError

_NUM_LISTED = 8


class Checkpointer(DetectionCheckpointer):
    """`DetectionCheckpointer` that does not guess.

    - `save` writes to a temporary file first: a run that is killed while it saves leaves the
      checkpoints that it wrote before, and the note of the last one, as they were.
    - `load` raises a CheckpointError if a tensor has another shape than the model's, or if one is
      missing on either side. `strict=False` (train.init_checkpoint_strict=false) loads what fits
      and logs the rest, for fine-tuning on other classes.
    - A file that holds only a backbone (`stem.*`, `res2.*`: Detectron2 and torchvision `.pkl`,
      `.safetensors`) goes into the model's backbone below the channel mapper (`backbone.bottom_up`;
      `backbone` if there is no mapper); each of its tensors must be used and each of the
      backbone's must be in it.
    - A file of the reference implementation is converted (`co_detr.checkpoint`); it has to fit.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, strict: bool = True, **checkpointables: Any
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.strict = strict

    def save(self, name: str, **kwargs: Any) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: part.state_dict() for key, part in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        with self.path_manager.open(f"{path}.tmp", "wb") as file:
            torch.save(data, cast(IO[bytes], file))
        os.replace(f"{path}.tmp", path)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        with self.path_manager.open(f"{path}.tmp", "w") as file:
            file.write(last_filename_basename)
        os.replace(f"{path}.tmp", path)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads `path` (a file or a URL known to Detectron2).

        Raises:
            CheckpointError: if the file is missing, unreadable or does not fit the model.
        """
        if path and "://" not in path and not os.path.isfile(path):
            raise CheckpointError(
                f"checkpoint {path} does not exist: set train.init_checkpoint to an existing file, "
                'or to "" to start from random weights.'
            )
        try:
            local_path = self.path_manager.get_local_path(path) if path else path
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {path} cannot be fetched ({error}): fetch it by other means and set "
                'train.init_checkpoint to the file, or to "" to start from random weights.'
            ) from error
        try:
            return super().load(local_path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # the parent forgets it only if nothing failed

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            if filename.endswith(".safetensors"):
                return {"model": _read_safetensors(filename)}
            loaded = super()._load_file(filename)
        except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error)
            raise CheckpointError(
                f"checkpoint {filename} cannot be read ({reason}): it is damaged or not a "
                "checkpoint; fetch or write it again."
            ) from error
        if not isinstance(loaded.get("model"), Mapping):
            raise CheckpointError(
                f"checkpoint {filename} holds no state dict: save the model as "
                '{"model": model.state_dict()}.'
            )
        return loaded

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if is_official(checkpoint["model"]):
            state = official_state_dict(checkpoint["model"])
            checkpoint["model"] = convert_official(state, self.model).state_dict
        self._convert_ndarray_to_tensor(checkpoint["model"])
        if _is_backbone(checkpoint, self.model):
            checkpoint["model"] = self._backbone_state(checkpoint)
            incompatible = super()._load_model(checkpoint)
            # The rest of the model keeps its initial values: that is what the file is for.
            incompatible.missing_keys.clear()
        else:
            # The heuristics are for backbones only; a whole model is matched by its names.
            checkpoint.pop("matching_heuristics", None)
            incompatible = super()._load_model(checkpoint)
        if self.strict:
            self._require_all_matched(incompatible)
        return incompatible

    def _require_all_matched(self, incompatible: Any) -> None:
        problems = [
            f"{key} is {shape_in_file} in the file but {shape_in_model} in the model"
            for key, shape_in_file, shape_in_model in incompatible.incorrect_shapes
        ]
        wrong_shape = {key for key, _, _ in incompatible.incorrect_shapes}
        missing = [key for key in incompatible.missing_keys if key not in wrong_shape]
        problems += [f"{key} is not in the file" for key in missing]
        problems += [f"{key} is not in the model" for key in incompatible.unexpected_keys]
        if problems:
            _raise_mismatch(
                problems,
                "build the model with the settings it was trained with (such as "
                "model.num_classes), or set train.init_checkpoint_strict=false to load only what "
                "fits",
            )

    def _backbone_state(self, checkpoint: dict[str, Any]) -> dict[str, Tensor]:
        path = _backbone_path(self.model)
        own = self.model.get_submodule(path).state_dict()
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
        problems = [f"{key} is not in the backbone" for key in sorted(state.keys() - own.keys())]
        problems += [f"{key} is not in the file" for key in sorted(missing)]
        if problems:
            _raise_mismatch(
                problems, "use the backbone settings (model.backbone) that the file was made with"
            )
        return {f"{path}.{key}": value for key, value in state.items()}


def _backbone_path(model: nn.Module) -> str:
    return "backbone.bottom_up" if hasattr(model.backbone, "bottom_up") else "backbone"


def _is_left_out(key: str) -> bool:
    """An ImageNet classifier (fc) and BatchNorm's counters are no part of a detector's backbone."""
    parts = key.split(".")
    return parts[-1] == "num_batches_tracked" or any(part.startswith("fc") for part in parts)


def _is_statistic(key: str) -> bool:
    return key.endswith((".running_mean", ".running_var"))


def _read_safetensors(filename: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(filename)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    # Half-precision files only save space; the model's own precision is float32.
    return {
        key: value.float() if value.is_floating_point() else value for key, value in tensors.items()
    }


def _is_backbone(checkpoint: dict[str, Any], model: nn.Module) -> bool:
    """True if the file has no tensor of the model outside of the backbone."""
    if not hasattr(model, "backbone"):
        return False
    inside = f"{_backbone_path(model)}."
    outside = {key for key in model.state_dict() if not key.startswith(inside)}
    # The names of a model that was trained with other settings differ in their last parts only.
    outside_parts = {key.split(".")[0] for key in outside} - {"backbone"}
    keys = [key.removeprefix("module.") for key in checkpoint["model"]]
    return not any(key in outside or key.split(".")[0] in outside_parts for key in keys)


def _raise_mismatch(problems: list[str], mend: str) -> NoReturn:
    shown = "; ".join(problems[:_NUM_LISTED])
    if len(problems) > _NUM_LISTED:
        shown += f"; and {len(problems) - _NUM_LISTED} more"
    raise CheckpointError(f"the checkpoint does not fit the model ({shown}): {mend}.")
