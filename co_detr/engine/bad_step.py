"""What is known of an optimiser step that must not be taken."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_NUM_LISTED = 6


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


def summarise(processes: list[BadStep]) -> Summary:
    """Brings together what each process knows of one step."""
    guilty = [
        each
        for each in processes
        if each.cause or not all(map(math.isfinite, each.losses.values()))
    ]
    terms = {
        name: value
        for each in guilty
        for name, value in each.losses.items()
        if not math.isfinite(value)
    }
    causes = [each.cause for each in guilty if each.cause]
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
        for each in guilty or processes
        for image in each.images
    ]
    return Summary(what, terms, details, images, processes)


def _first(values: list[str]) -> list[str]:
    return values[:_NUM_LISTED]
