"""Steps whose loss or gradient is NaN or infinite: skipped, counted, and at last explained."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from co_detr.errors import NonFiniteError, require_whole
from co_detr.files import written_whole

logger = logging.getLogger(__name__)

_NUM_LISTED = 6


class NonFiniteGuard:
    """Lets a few bad steps in a row pass and stops the training at the next one.

    Args:
        model: for the names of its tensors.
        optimizer: for its learning rates.
        grad_scaler: for the loss scale.
        amp_dtype: of autocast, for the diagnosis.
        output_dir: where the diagnosis goes.
        max_skips: steps in a row that are skipped (train.non_finite.max_skips).

    Raises:
        ConfigError: if `max_skips` is negative.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        grad_scaler: torch.amp.GradScaler,
        *,
        amp_dtype: torch.dtype | None,
        output_dir: str,
        max_skips: int,
    ) -> None:
        require_whole("train.non_finite.max_skips", max_skips, least=0)
        self.model = model
        self.optimizer = optimizer
        self.grad_scaler = grad_scaler
        self.amp_dtype = amp_dtype
        self.output_dir = output_dir
        self.max_skips = max_skips
        self.in_a_row = 0
        self._statistics = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
            for buffer in module.buffers(recurse=False)
        ]
        self._remembered: list[Tensor] = []

    def before_forward(self) -> None:
        """Remembers the statistics of batch norms, which change in the forward pass already."""
        self._remembered = [buffer.clone() for buffer in self._statistics]

    def restore_statistics(self) -> None:
        """Makes what forward passes since `before_forward` did to them undone."""
        for buffer, value in zip(self._statistics, self._remembered, strict=True):
            buffer.copy_(value)

    def passed(self) -> None:
        """The step is good."""
        self.in_a_row = 0

    def failed(self, step: BadStep) -> None:
        """Reports a step that must not be taken; to be called by all processes.

        Raises:
            NonFiniteError: after `max_skips` skipped steps in a row; it names the diagnosis.
        """
        self.restore_statistics()
        self.in_a_row += 1
        summary = summarize(comm.all_gather(step))
        if self.in_a_row > self.max_skips:
            raise self._error(step, summary, joint=True)
        logger.warning(
            "%s at iteration %d%s on the images %s: the step is skipped (%d in a row; more than %d "
            "stop the training).",
            *(summary.what, step.iteration, summary.details),
            *(summary.listed_images, self.in_a_row, self.max_skips),
        )

    def failed_alone(self, step: BadStep) -> NonFiniteError:
        """The error for a step that failed in this process in a way that others cannot know of."""
        return self._error(step, summarize([step]), joint=False)

    def _error(self, step: BadStep, summary: Summary, joint: bool) -> NonFiniteError:
        path = os.path.join(self.output_dir, f"non_finite_{step.iteration:07d}.json")
        if comm.is_main_process() or not joint:
            path = self._write_diagnosis(path, step, summary)
        skipped = f", after {self.max_skips} skipped steps," if self.max_skips else ""
        error = NonFiniteError(
            f"{summary.what} at iteration {step.iteration}{summary.details} on the images "
            f"{summary.listed_images}{skipped} and the training stops: the weights "
            "were not changed and the checkpoints written so far are intact; look at "
            f"{path}, check these images and their boxes, or lower "
            "optimizer.lr or set train.amp.enabled=false, and continue with --resume."
        )
        error.joint = joint
        return error

    def _write_diagnosis(self, path: str, step: BadStep, summary: Summary) -> str:
        scaler = self.grad_scaler
        content = {
            "what": summary.what,
            "iteration": step.iteration,
            "steps_in_a_row": self.in_a_row,
            "max_skips": self.max_skips,
            "cause": step.cause,
            "non_finite_loss_terms": summary.terms,
            "grad_norm": step.grad_norm,
            "learning_rates": sorted({group["lr"] for group in self.optimizer.param_groups}),
            "amp": {
                "dtype": None if self.amp_dtype is None else str(self.amp_dtype),
                "loss_scale": scaler.get_scale() if scaler.is_enabled() else None,
            },
            # Of the writing process; parameters and gradients are the same in all.
            "non_finite_tensors": {
                "parameters": _not_finite(self.model.named_parameters()),
                "gradients": _not_finite(
                    (name, parameter.grad) for name, parameter in self.model.named_parameters()
                ),
                "buffers": _not_finite(self.model.named_buffers()),
            },
            "processes": [
                {
                    "rank": rank,
                    "loss_terms": process.losses,
                    "images": list(map(asdict, process.images)),
                }
                for rank, process in enumerate(summary.processes)
            ],
        }
        try:
            with written_whole(path) as file:
                json.dump(_json_numbers(content), file, indent=2, allow_nan=False)
                file.write("\n")
        except OSError as error:
            # The error that it explains matters more.
            return f"{path} (which could not be written: {error.strerror})"
        return path


@dataclass(frozen=True)
class ImageFacts:
    """What the diagnosis says of one training sample; sizes in pixels, after augmentation."""

    file_name: str
    image_id: int | str
    boxes: int
    height: int
    width: int
    pixels_finite: bool


@dataclass(frozen=True)
class BadStep:
    """What one process knows of a step that was not taken.

    Attributes:
        iteration: of the step.
        losses: this process's loss terms; empty if there were none yet.
        grad_norm: before clipping, the same in all processes; None if there was no gradient.
        images: of this process, over all micro-batches.
        cause: what the model said, if it raised an error before there was a loss.
    """

    iteration: int
    losses: dict[str, float]
    grad_norm: float | None
    images: list[ImageFacts]
    cause: str = ""


@dataclass(frozen=True)
class Summary:
    """A bad step as all processes see it."""

    what: str
    terms: dict[str, float]  # the loss terms that are not finite, of whichever process
    details: str
    images: list[str]  # of the processes where the loss went wrong; of all if it did nowhere
    processes: list[BadStep]

    @property
    def listed_images(self) -> str:
        """The first few of them."""
        return ", ".join(_first(self.images))


def facts_of(batches: Iterable[Sequence[dict[str, Any]]]) -> list[ImageFacts]:
    """The facts of all samples of some micro-batches."""
    return [_facts(sample) for batch in batches for sample in batch]


def summarize(processes: list[BadStep]) -> Summary:
    """Brings together what each process knows of one step."""
    guilty = [
        process
        for process in processes
        if process.cause or not all(map(math.isfinite, process.losses.values()))
    ]
    terms = {
        name: value
        for process in guilty
        for name, value in process.losses.items()
        if not math.isfinite(value)
    }
    causes = [process.cause for process in guilty if process.cause]
    if causes:
        what, details = causes[0].rstrip("."), ""
    elif terms:
        what = "the loss became NaN or infinite"
        listed = [f"{name}={value}" for name, value in sorted(terms.items())]
        details = f" ({', '.join(_first(listed))})"
    else:
        what = "the gradient became NaN or infinite"
        details = f" (norm={processes[0].grad_norm})"
    images = [
        f"{image.file_name} (id {image.image_id})"
        for process in guilty or processes
        for image in process.images
    ]
    return Summary(what, terms, details, images, processes)


def _facts(sample: dict[str, Any]) -> ImageFacts:
    image = sample["image"]
    height, width = image.shape[-2:]
    return ImageFacts(
        file_name=str(sample.get("file_name", "?")),
        image_id=sample.get("image_id", "?"),
        boxes=len(sample["instances"]) if "instances" in sample else 0,
        height=int(height),
        width=int(width),
        pixels_finite=bool(torch.isfinite(image).all()),
    )


def _first(values: list[str]) -> list[str]:
    return values[:_NUM_LISTED]


def _not_finite(tensors: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    return [
        name for name, tensor in tensors if tensor is not None and not torch.isfinite(tensor).all()
    ]


def _json_numbers(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become "nan", "inf" and "-inf"."""
    if isinstance(value, dict):
        return {key: _json_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_json_numbers(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
