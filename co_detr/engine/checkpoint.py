"""Checkpoints: written whole or not at all, read strictly and safely, from several formats."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import Tensor, nn

from co_detr.checkpoint import (
    convert_official,
    is_official,
    official_state_dict,
    rename_official,
    shorten,
    stored_class_names,
    unwrap,
)
from co_detr.checkpoint_averaged import AVERAGED, Weights, choose_weights
from co_detr.checkpoint_classes import match_classes, remap_classes
from co_detr.checkpoint_reading import read_checkpoint
from co_detr.checkpoint_report import LoadReport, mismatch_error
from co_detr.engine.backbone_file import backbone_state, is_backbone
from co_detr.engine.checkpoint_files import (
    MARKER,
    RUN_ID,
    has_checkpoints,
    last_readable_jointly,
)
from co_detr.errors import CheckpointError, ConfigError
from co_detr.files import write_error_of, written_whole
from co_detr.modeling import CoDETR

logger = logging.getLogger(__name__)

_PIXELS = ("pixel_mean", "pixel_std")  # set by the config; Detectron2 lets them be missing, too

Mismatch = Literal["error", "by_name", "reset"]


class Checkpointer(DetectionCheckpointer):
    """`DetectionCheckpointer` that does not guess and runs nothing that is in a file.

    - `save` writes to a temporary file first: a run that is killed while it saves leaves the
      checkpoints that it wrote before, and the note of the last one, as they were.
    - `resume_or_load` passes over a last checkpoint that is missing or damaged, with a warning.
    - `load` raises a CheckpointError if a tensor has another shape than the model's, or if one is
      missing on either side; see `mismatch` for fine-tuning on other classes. It logs what it did.
    - A file that holds only a backbone (`stem.*`, `res2.*`: Detectron2 and torchvision `.pkl`,
      `.safetensors`) goes into the model's backbone below the channel mapper (`backbone.bottom_up`;
      `backbone` if there is no mapper); each of its tensors must be used and each of the
      backbone's must be in it.
    - A file of the reference implementation is converted (`co_detr.checkpoint`).

    Args:
        model: to load into and to save.
        save_dir: where `save` writes.
        mismatch: what to do with a file that does not fit: "error"; "by_name" carries the rows of
            the class heads over by class name and refuses other differences; "reset" loads what
            fits and leaves the rest at its initial values (train.init_checkpoint_mismatch).
        unsafe: let a file run code while it is read (train.init_checkpoint_unsafe).
        weights: which weights to load of a file that has two sets (train.init_checkpoint_weights);
            None: those that training goes on from.
        class_names: of the data, in order; saved in every checkpoint.

    Attributes:
        run_id: of the run, saved in every checkpoint; None: of none.
        resumed_from: path of the checkpoint that `resume_or_load` has resumed from, or "".
        checkpointables: see `DetectionCheckpointer`.

    Raises:
        ConfigError: if `mismatch` is none of the three.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        mismatch: Mismatch = "error",
        unsafe: bool = False,
        weights: Weights | None = "ema",
        class_names: Sequence[str] | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        if mismatch not in ("error", "by_name", "reset"):
            raise ConfigError(
                f'train.init_checkpoint_mismatch={mismatch} must be "error", "by_name" or "reset".'
            )
        self.mismatch = mismatch
        self.unsafe = unsafe
        self.weights = weights
        self.class_names = None if class_names is None else list(class_names)
        self.run_id: str | None = None
        self.resumed_from = ""
        self._report = LoadReport("", 0)
        self._resuming = False

    def save(self, name: str, *, tag: bool = True, **kwargs: Any) -> None:
        """Writes `<name>.pth` and makes it the last checkpoint, unless `tag` is false.

        Raises:
            CheckpointError: if it cannot be written; what was there before is as it was.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        if self.class_names is not None:
            data["class_names"] = self.class_names
        if self.run_id is not None:
            data[RUN_ID] = self.run_id
        data.update({key: part.state_dict() for key, part in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        try:
            with written_whole(path, "wb") as file:
                torch.save(data, file)
            if tag:
                self.tag_last_checkpoint(os.path.basename(path))
        except (OSError, RuntimeError) as error:
            reason = write_error_of(error)
            if reason is None:
                raise
            kept = self.get_checkpoint_file()
            raise CheckpointError(
                f"checkpoint {path} cannot be written ({reason.strerror or reason}); "
                f"{f'the last one is still {kept}' if kept else 'there is no earlier one'}: make "
                "room or correct the permissions, and continue with --resume."
            ) from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with written_whole(os.path.join(self.save_dir, MARKER)) as file:
            file.write(last_filename_basename)

    def has_checkpoint(self) -> bool:
        """Whether there is something to resume, as the main process sees it."""
        return comm.all_gather(has_checkpoints(self.save_dir))[0]

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Loads the last checkpoint that can be read, with everything in it, or the weights of
        `path`.

        Raises:
            CheckpointError: see `load` and `last_readable`; also if the last checkpoint lacks what
                this run has to resume, or is not to be seen by all processes.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        found = last_readable_jointly(self.save_dir)
        self._resuming = True
        self.resumed_from = found
        try:
            return self.load(found)
        finally:
            self._resuming = False

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
        if not path:
            logger.info("No checkpoint is given: the weights stay as they were initialised.")
            return {}
        try:
            return super().load(local_path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # the parent forgets it only if nothing failed

    def _load_file(self, filename: str) -> dict[str, Any]:
        loaded = read_checkpoint(filename, self.unsafe)
        if self.weights is not None:
            loaded = choose_weights(loaded, self.weights, filename)
        self._report = LoadReport(os.path.basename(filename), len(self.model.state_dict()))
        state = unwrap(loaded)
        if not state or not all(isinstance(each, Tensor | np.ndarray) for each in state.values()):
            raise CheckpointError(
                f"checkpoint {filename} holds no state dict, only "
                f"{shorten([str(key) for key in loaded]) or 'nothing'}: "
                'save the model as {"model": model.state_dict()}.'
            )
        # An average of the weights may begin in the course of a training.
        needed = self.checkpointables.keys() - {AVERAGED} if self._resuming else ()
        absent = [key for key in self.checkpointables if key in needed and key not in loaded]
        if absent:
            raise CheckpointError(
                f"checkpoint {filename} has no {' and no '.join(absent)}, so that no training can "
                "go on from it: start a new one with train.init_checkpoint set to it."
            )
        return loaded | {"model": dict(state), "class_names": stored_class_names(loaded)}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        official = is_official(checkpoint["model"])
        unknown = self._convert(checkpoint) if official else []
        state = {key.removeprefix("module."): each for key, each in checkpoint["model"].items()}
        self._convert_ndarray_to_tensor(state)
        checkpoint["model"] = state
        backbone_only = not official and is_backbone(state, self.model)
        if backbone_only:
            checkpoint["model"] = backbone_state(checkpoint, self.model)
            self._report.scope, self._report.num_tensors = "backbone", len(checkpoint["model"])
        else:
            # The heuristics are for backbones only; a whole model is matched by its names.
            checkpoint.pop("matching_heuristics", None)
            self._match_classes(checkpoint)
        # Not the missing keys that torch reports: frozen norms fill in absent statistics silently.
        known = {*checkpoint["model"], *_PIXELS}
        absent = [key for key in self.model.state_dict() if key not in known]
        incompatible = super()._load_model(checkpoint)
        # Beside a backbone, the model keeps its initial values: that is what such a file is for.
        incompatible.missing_keys[:] = [] if backbone_only else absent
        self._conclude(incompatible, unknown)
        return incompatible

    def _convert(self, checkpoint: dict[str, Any]) -> list[str]:
        """Official tensors in our names; returns the names that are unknown."""
        if not isinstance(self.model, CoDETR):
            raise CheckpointError(
                "the checkpoint is one of the reference Co-DETR, but the model is a "
                f"{type(self.model).__name__}: choose a config of a Co-DETR model."
            )
        convert = convert_official if self.mismatch == "error" else rename_official
        conversion = convert(official_state_dict(checkpoint["model"]), self.model)
        checkpoint["model"] = conversion.state_dict
        self._report.ignored = conversion.ignored
        return conversion.unknown

    def _match_classes(self, checkpoint: dict[str, Any]) -> None:
        theirs, ours = checkpoint.get("class_names"), self.class_names
        if self.mismatch != "by_name":
            if theirs and ours and _folded(theirs) != _folded(ours):
                logger.warning(
                    "%s was trained on %d classes (%s), the data has %d (%s): class heads are "
                    "taken over %s; train.init_checkpoint_mismatch=by_name would match them.",
                    *(self._report.file, len(theirs), shorten(theirs)),
                    *(len(ours), shorten(ours), "by position, not by name"),
                )
            return
        if not theirs or not ours:
            side = "checkpoint" if not theirs else "data set"
            raise CheckpointError(
                f"the {side} does not say the names of its classes, which "
                "train.init_checkpoint_mismatch=by_name needs: set it to reset."
            )
        self._report.classes = match_classes(theirs, ours)
        remap_classes(checkpoint["model"], self.model, self._report.classes)

    def _conclude(self, incompatible: Any, unknown: list[str]) -> None:
        """Raises if the file had to fit and does not; else notes what is not loaded."""
        kept = [
            f"{key} is {shape_in_file} in the file but {shape_in_model} in the model"
            for key, shape_in_file, shape_in_model in incompatible.incorrect_shapes
        ]
        kept += [f"{key} is not in the file" for key in incompatible.missing_keys]
        unused = [*incompatible.unexpected_keys, *unknown]
        if self.mismatch != "reset" and (kept or unused):
            mend = "build the model with the settings it was trained with (such as "
            mend += "model.num_classes), or "
            if self._lacks_all_heads(incompatible.missing_keys):
                mend = "the file has no auxiliary heads (it was stripped, or trained without): set "
                mend += "model.auxiliary=null to do without them, too, or "
            if self._resuming:
                mend += "start a new run with train.init_checkpoint set to the checkpoint"
            else:
                mend += "set train.init_checkpoint_mismatch=by_name to take class heads over by "
                mend += "class name, or =reset to load only what fits"
            raise mismatch_error([*kept, *(f"{key} is not in the model" for key in unused)], mend)
        self._report.kept, self._report.unused = kept, unused
        if self._report.num_loaded == 0:
            raise mismatch_error(
                [*kept, *unused], "not one tensor fits; choose the config of this checkpoint"
            )

    def _lacks_all_heads(self, missing: Sequence[str]) -> bool:
        heads = {key for key in self.model.state_dict() if key.startswith("auxiliary.")}
        return bool(heads) and heads <= set(missing)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        level = logging.INFO if self._report.complete else logging.WARNING
        logger.log(level, self._report.text())


def _folded(names: Sequence[str]) -> list[str]:
    return [name.casefold() for name in names]
