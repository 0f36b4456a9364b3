"""The images to measure on: any COCO-format set, as the evaluation's data mapper reads it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, overload

from detectron2.config import instantiate
from detectron2.data import DatasetMapper
from omegaconf import DictConfig

from co_detr.analysis.subject import Sample
from co_detr.data.coco import class_names, load_coco
from co_detr.data.coco_file import shortened
from co_detr.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


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

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> MappedSamples: ...
    def __getitem__(self, index):
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
