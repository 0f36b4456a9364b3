"""What is measured: models, and the images they are measured on.

A measure is a function ``measure(subjects, samples, progress) -> Section``, where
``progress(iterable)`` shows how far a loop has come.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from co_detr.modeling.co_detr import CoDETR

Progress = Callable[[Iterable], Iterable]


@dataclass(frozen=True)
class Subject:
    """A model in eval mode, on its device, with the name it has in the report.

    ``checkpoints`` are the run's checkpoints, the earliest first; empty for a model that was named
    by a configuration and weights.
    """

    name: str
    model: CoDETR
    cfg: DictConfig
    checkpoints: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One image as the model reads it.

    ``input`` is Detectron2's dictionary for one image after the evaluation's augmentation:
    ``"image"`` `(3, H, W)`, ``"instances"`` with ``gt_boxes`` (absolute xyxy pixels of that
    resolution) and ``gt_classes``, and ``"height"``, ``"width"`` of the file.
    """

    input: dict
    file_name: str
    image_id: int
