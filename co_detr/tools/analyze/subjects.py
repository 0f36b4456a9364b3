"""What is measured: the models, and the images that they are measured on.

A measure is a function ``measure(subjects, samples, progress) -> Section``, where
``progress(iterable)`` shows how far a loop has come.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data import DatasetMapper
from omegaconf import DictConfig

from co_detr.checkpoint.detector import load_detector
from co_detr.checkpoint.saving import FINAL, belongs_to, kept_checkpoints, read_identity
from co_detr.data.coco import load_coco
from co_detr.data.coco_classes import class_names
from co_detr.data.coco_file import shortened
from co_detr.data.images import ImageReader
from co_detr.engine.validation import BEST
from co_detr.errors import ConfigError, DataError
from co_detr.modeling import CoDETR

CONFIG = "config.yaml"
logger = logging.getLogger(__name__)
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


@dataclass(frozen=True)
class ModelArgument:
    """Where a model comes from.

    Attributes:
        name: in the report.
        config: a config file, or a name of the model zoo.
        weights: the file that is analyzed; None: those released for the model.
        checkpoints: all that the run kept, the earliest first.
    """

    name: str
    config: str
    weights: str | None
    checkpoints: tuple[Path, ...] = ()


def parse_model(text: str) -> ModelArgument:
    """Reads ``NAME=FOLDER``, ``NAME=CONFIG,WEIGHTS`` or ``NAME=CONFIG``; the name can be left out.

    A folder is the output folder of a run, whose last weights are taken, or else its best ones. A
    checkpoint alone lies in such a folder. The name ends at the last ``=``, so that it may have one
    itself, as ``K = 2``, unless what follows another one exists: paths may have ``=`` and ``,``.

    Raises:
        ConfigError: if the folder is missing or has no config or no weights.
    """
    name, place = _split_name(text)
    if not place:
        raise ConfigError(
            f"--model {text!r} names no model: write NAME=FOLDER, with the output folder of a run, "
            "or NAME=CONFIG,WEIGHTS."
        )
    config, weights = _split_weights(place)
    if weights:
        return ModelArgument(name or Path(weights).stem, config, weights)
    path = Path(config)
    if path.is_dir():
        return _of_run(name or path.resolve().name, path)
    is_checkpoint = path.suffix == ".pth"
    if ("/" in config or is_checkpoint) and not path.is_file():
        raise ConfigError(
            f"--model {text!r}: there is no {config}; name the output folder of a run, or a config "
            "and weights, as in NAME=CONFIG,WEIGHTS."
        )
    if not is_checkpoint:
        return ModelArgument(name or path.stem, config, None)
    beside = path.parent / CONFIG
    if not beside.is_file():
        raise ConfigError(
            f"--model {text!r}: there is no {CONFIG} beside the checkpoint; name its config, too, "
            "as in NAME=CONFIG,WEIGHTS."
        )
    return ModelArgument(name or path.stem, str(beside), config)


def _split_name(text: str) -> tuple[str, str]:
    """Name, which may be empty, and what it stands for."""
    starts = [0, *(match.end() for match in re.finditer("=", text))]
    places = [text[start:].strip() for start in starts]
    found = [
        # A config may also be a name of the model zoo.
        sum(2 - at for at, part in enumerate(_split_weights(place)) if os.path.exists(part))
        for place in places
    ]
    best = found.index(max(found)) if any(found) else len(places) - 1
    return text[: max(0, starts[best] - 1)].strip(), places[best]


def _split_weights(place: str) -> tuple[str, str]:
    """Config or folder, and weights, which may be empty."""
    commas = [match.start() for match in re.finditer(",", place)]
    splits = [(place[:comma].strip(), place[comma + 1 :].strip()) for comma in commas]
    if os.path.exists(place) or not splits:
        return place, ""
    there = [split for split in splits if os.path.isfile(split[1])]
    return (there or splits)[0]


def _of_run(name: str, folder: Path) -> ModelArgument:
    run = read_identity(str(folder))

    def is_own(path: Path) -> bool:
        return path.is_file() and (run is None or belongs_to(str(path), run))

    checkpoints = tuple(filter(is_own, map(Path, kept_checkpoints(str(folder)))))
    preferred = (folder / FINAL, folder / f"{BEST}.pth", *reversed(checkpoints))
    weights = next(filter(is_own, preferred), None)
    missing = [
        what
        for what, there in ((CONFIG, (folder / CONFIG).is_file()), ("checkpoint", weights))
        if not there
    ]
    if missing:
        raise ConfigError(
            f"{folder} has no {' and no '.join(missing)}: name the output folder of a run, or a "
            "config and weights, as in NAME=CONFIG,WEIGHTS."
        )
    return ModelArgument(name, str(folder / CONFIG), str(weights), checkpoints)


@dataclass(frozen=True)
class Models:
    """The models of one analysis, all for the classes ``class_names``."""

    subjects: tuple[Subject, ...]
    class_names: list[str]


def load_models(
    arguments: Sequence[ModelArgument], device: torch.device, unsafe: bool = False
) -> Models:
    """Reads the models with all their parts and checks that they can be compared.

    Raises:
        ConfigError: if two have one name, other classes or another input, or one is no Co-DETR.
        CheckpointError: if weights are unreadable or do not fit.
    """
    names = [argument.name for argument in arguments]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f'two models are called "{twice[0]}": give each --model its own name.')
    subjects: list[Subject] = []
    classes: list[str] = []
    for argument in arguments:
        detector = load_detector(
            argument.config, argument.weights, unsafe=unsafe, training_parts=True
        )
        if not isinstance(detector.model, CoDETR):
            raise ConfigError(
                f"{argument.config} builds a {type(detector.model).__name__}, but only Co-DETR "
                "models can be analyzed: name another config."
            )
        detector.model.mask_head = None  # no measure looks at masks
        if detector.model.auxiliary is not None:
            detector.model.auxiliary.ignore_masks()
        subject = Subject(
            argument.name, detector.model.to(device), detector.cfg, argument.checkpoints
        )
        if subjects:
            first = subjects[0]
            if classes != detector.class_names:
                raise ConfigError(
                    f'"{first.name}" has the classes ({shortened(classes)}) but "{argument.name}" '
                    f"has ({shortened(detector.class_names)}): compare models that were trained "
                    "on the same classes."
                )
            if _input_of(first) != _input_of(subject):
                raise ConfigError(
                    f'"{first.name}" and "{argument.name}" read or resize images differently in '
                    "the evaluation (dataloader.test.mapper, data.value_range): analyze them one "
                    "by one."
                )
        subjects.append(subject)
        classes = detector.class_names
    return Models(tuple(subjects), classes)


def _input_of(subject: Subject) -> tuple[Any, ...]:
    mapper = subject.cfg.dataloader.test.mapper
    value_range = ImageReader.of_data(subject.cfg.data).value_range
    return mapper.augmentations, mapper.image_format, value_range


class MappedSamples(Sequence[Sample]):
    """Samples that are read when they are asked for, so that memory does not bound their number.

    Args:
        records: dataset dicts with ``annotations``.
        mapper: of the evaluation; its ``is_train`` is set, so that annotations are kept.
    """

    def __init__(self, records: Sequence[dict[str, Any]], mapper: DatasetMapper) -> None:
        mapper.is_train = True
        self.records = records
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | slice) -> Sample | MappedSamples:
        if isinstance(index, slice):
            return MappedSamples(self.records[index], self.mapper)
        record = self.records[index]
        return Sample(self.mapper(record), record["file_name"], record["image_id"])


def load_samples(
    cfg: DictConfig,
    names: Sequence[str],
    number: int,
    annotation_file: str | None = None,
    image_root: str | None = None,
) -> MappedSamples:
    """So many images of a set, evenly spread over it, with the classes of the model.

    Args:
        cfg: of a model; says how images are resized, and which set is taken by default.
        names: classes of the model.
        number: of images; all, if the set has fewer.
        annotation_file, image_root: another set, in COCO format.

    Raises:
        ConfigError: if `number` is below 1 or only one half of a set is given.
        DataError: if the set cannot be read or has other classes.
    """
    if number < 1:
        raise ConfigError(f"--images {number} must be at least 1.")
    if (annotation_file is None) != (image_root is None):
        raise ConfigError("--data-json and --data-images belong together: give both or neither.")
    if annotation_file is None:
        annotation_file = cfg.data.val
        records = instantiate(cfg.dataloader.test.dataset)
    else:
        records = load_coco(annotation_file, image_root, invalid_boxes="skip")
    numbers = _class_numbers(class_names(annotation_file), names, annotation_file)
    count = min(number, len(records))
    records = [records[index * len(records) // count] for index in range(count)]
    for record in records:
        for annotation in record["annotations"]:
            annotation["category_id"] = numbers[annotation["category_id"]]
    return MappedSamples(records, instantiate(cfg.dataloader.test.mapper))


def _class_numbers(own: Sequence[str], names: Sequence[str], annotation_file: str) -> list[int]:
    """The model's class for each class of the set: by name, or else by position."""
    if set(own) <= set(names):
        return [list(names).index(name) for name in own]
    if len(own) == len(names):
        logger.warning(
            "%s has the categories (%s), the model has (%s): they are matched by position.",
            *(annotation_file, shortened(own), shortened(names)),
        )
        return list(range(len(own)))
    raise DataError(
        f"{annotation_file} has the categories ({shortened(own)}) but the model is for "
        f"({shortened(names)}): measure on images with classes of the model."
    )
