"""Looks a data set over before it is used, so that no defect shows as an AP of 0 hours later.

`preflight` only reports; what a warning calls "left out" or "clipped" is done by `load_coco`, and
what it calls "by name" by `align_classes`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from co_detr.data.coco import require_choice
from co_detr.data.coco_file import read_coco
from co_detr.data.images import ImageReader
from co_detr.data.preflight_annotations import check_annotations
from co_detr.data.preflight_boxes import Limits
from co_detr.data.preflight_images import DeepImage, check_images, check_values
from co_detr.data.preflight_report import PreflightReport, SplitReport
from co_detr.errors import ConfigError


@dataclass(frozen=True)
class PreflightSettings:
    """The node data.preflight.

    Attributes:
        images: "all" decodes every image, "sample" some of each split, "off" none. Whether the
            files exist is looked up for all of them in any case.
        sample_size: how many images of each split "sample" decodes.
        suspicion: "error" or "warning": what it is when boxes look, over the whole file, as if
            they were no (x, y, w, h) of these images.
    """

    images: str = "sample"
    sample_size: int = 64
    suspicion: str = "error"

    def __post_init__(self) -> None:
        require_choice("data.preflight.images", self.images, ("all", "sample", "off"))
        require_choice("data.preflight.suspicion", self.suspicion, ("error", "warning"))
        if not (isinstance(self.sample_size, int) and self.sample_size >= 1):
            raise ConfigError(
                f"data.preflight.sample_size={self.sample_size} must be a whole number of at "
                "least 1; data.preflight.images=off decodes no image."
            )


@dataclass(frozen=True)
class SplitFiles:
    """What data.train and data.train_images (or those of val) name."""

    split: str
    annotations: str
    images: str


def preflight(
    splits: list[SplitFiles],
    settings: PreflightSettings | None = None,
    invalid_boxes: str = "skip",
    limits: Limits | None = None,
    unlabeled: bool = False,
    reader: ImageReader | None = None,
) -> PreflightReport:
    """Inspects "train" and "val", or one of them.

    Args:
        invalid_boxes: as in `load_coco`; decides whether boxes without area are errors.
        limits: of the model and the evaluation, which the objects of each image are compared with.
        unlabeled: whether a file without annotations is that of a test set, and no error.
        reader: opens the images; None: one with its defaults.

    Raises:
        DataError: if an annotation file cannot be read at all. Everything else is in the report;
            see `PreflightReport.raise_on_errors`.
    """
    settings = settings or PreflightSettings()
    reader = reader or ImageReader()
    require_choice("data.invalid_boxes", invalid_boxes, ("error", "skip"))
    reports: list[SplitReport] = []
    paths: list[set[str]] = []
    deep: list[DeepImage] = []
    for files in splits:
        report = SplitReport(files.split, files.annotations, suspicion=settings.suspicion)
        # Kept, as the file is loaded next.
        content = read_coco(files.annotations, keep=True)
        limits = limits or Limits()
        images = check_annotations(report, content, invalid_boxes, limits, unlabeled)
        count = {"all": None, "sample": settings.sample_size, "off": 0}[settings.images]
        checked = check_images(report, images, files.images, count, reader)
        deep += checked.deep
        reports.append(report)
        root = os.path.realpath(files.images)
        paths.append(
            {os.path.normpath(os.path.join(root, each["file_name"])) for each in checked.found}
        )
    check_values(reports[0], deep)
    if len(reports) == 2:
        train, val = reports
        _compare_classes(train, val)
        val.add(
            "warning",
            sorted(paths[0] & paths[1]),
            "images that are in train, too",
            "AP on them says little about new images",
        )
    return PreflightReport(reports)


def _compare_classes(train: SplitReport, val: SplitReport) -> None:
    known, named = train.class_names, val.class_names
    unknown = [name for name in named if name not in known]
    similar = {_plain(name): name for name in known}
    near = [similar[_plain(name)] for name in unknown if _plain(name) in similar]
    cause = f" (train has {near[0]!r}: upper and lower case and spaces count)" if near else ""
    val.add(
        "error",
        list(map(repr, unknown)) if near else unknown,
        f"categories that train lacks (it has {', '.join(known[:8]) or 'none'})",
        f"give both files the same names, or remove the categories and their boxes from val{cause}",
    )
    absent = [name for name in known if name not in named]
    val.add(
        "warning", absent, "categories of train that val lacks", "they are learned, not evaluated"
    )
    if unknown:
        return
    ids = {name: key for name, (key, _) in zip(known, train.categories, strict=True)}
    moved = [
        f"{name}, id {key} here and {ids[name]} in train"
        for name, (key, _) in zip(named, val.categories, strict=True)
        if ids[name] != key
    ]
    val.add("warning", moved, "categories with another id than in train", "matched by name")


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())
