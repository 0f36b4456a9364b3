"""Looks a data set over before it is used, so that no defect shows as an AP of 0 hours later.

`preflight` only reports; what a warning calls "left out" or "clipped" is done by `load_coco`, and
what it calls "by name" by `align_classes`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from co_detr.data.boxes import require_choice
from co_detr.data.coco_file import read_coco
from co_detr.data.images import ImageReader
from co_detr.data.preflight_annotations import check_annotations
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
    """

    images: str = "sample"
    sample_size: int = 64

    def __post_init__(self) -> None:
        require_choice("data.preflight.images", self.images, ("all", "sample", "off"))
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
    reader: ImageReader | None = None,
) -> PreflightReport:
    """Inspects "train" and "val", or one of them.

    Args:
        invalid_boxes: as in `load_coco`; decides whether boxes without area are errors.
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
        report = SplitReport(files.split, files.annotations)
        images = check_annotations(report, read_coco(files.annotations), invalid_boxes)
        count = {"all": None, "sample": settings.sample_size, "off": 0}[settings.images]
        deep += check_images(report, images, files.images, count, reader)
        reports.append(report)
        root = os.path.realpath(files.images)
        paths.append({os.path.normpath(os.path.join(root, i["file_name"])) for i in images})
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
    unknown = [name for name in val.class_names if name not in train.class_names]
    val.add(
        "error",
        unknown,
        f"categories that train lacks (it has {', '.join(train.class_names[:8]) or 'none'})",
        "give both files the same names, or remove the categories and their boxes from val",
    )
    absent = [name for name in train.class_names if name not in val.class_names]
    val.add(
        "warning", absent, "categories of train that val lacks", "they are learned, not evaluated"
    )
    if unknown or train.categories == val.categories:
        return
    repeats = len(set(train.class_names)) < len(train.categories)
    if train.class_names != val.class_names and (
        repeats or len(set(val.class_names)) < len(val.categories)
    ):
        val.add(
            "error",
            ["a name occurs twice"],
            "list of categories that cannot be matched with train's",
            "make the names unique, or give both files the same categories in the same order",
        )
        return
    ids = {name: key for key, name in train.categories}
    moved = [
        f"{name}, id {key} here and {ids[name]} in train"
        for key, name in val.categories
        if ids[name] != key
    ]
    val.add("warning", moved, "categories with another id than in train", "matched by name")
