"""Data sets in COCO's format with ways of their own: LVIS v1 and Objects365 v2.

LVIS has COCO's images with 1203 classes, of which many are rare.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any
from urllib.parse import urlparse

from detectron2.data.samplers import RepeatFactorTrainingSampler

from co_detr.data.coco import load_coco
from co_detr.errors import DataError


def load_lvis(
    annotation_file: str,
    image_root: str,
    num_classes: int | None = None,
    invalid_boxes: str = "error",
    repeat_threshold: float = 0.0,
) -> list[dict[str, Any]]:
    """Reads an LVIS json; as `load_coco`, with two differences.

    Args:
        image_root: directory that holds COCO's `train2017` and `val2017`. LVIS says where each
            image is by its address (`coco_url`): its val set has images of both directories.
        repeat_threshold: images with a class that is in less than this share of all images are
            listed several times, see `repeat_rare_classes`; 0: every image once.

    Raises:
        DataError: as `load_coco`; or if an image has no `coco_url`.
    """
    path_of = partial(_path_of_url, annotation_file)
    records = load_coco(annotation_file, image_root, num_classes, invalid_boxes, path_of)
    return repeat_rare_classes(records, repeat_threshold) if repeat_threshold else records


def repeat_rare_classes(records: list[dict[str, Any]], threshold: float) -> list[dict[str, Any]]:
    """Lists an image r times, r = ceil(max over its classes of max(1, sqrt(threshold / f))).

    f is the share of images that show the class. Source: LVIS (Gupta et al., 2019) appendix B.2,
    rounded up as mmdet's ``ClassBalancedDataset`` does it.
    """
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(records, threshold)
    return [
        record
        for record, factor in zip(records, factors.tolist(), strict=True)
        for _ in range(math.ceil(factor))
    ]


def _path_of_url(annotation_file: str, image: dict[str, Any]) -> str:
    """.../train2017/000000391895.jpg -> train2017/000000391895.jpg"""
    parts = urlparse(image.get("coco_url", "")).path.split("/")
    if len(parts) < 2:
        raise DataError(
            f"image {image.get('id')} of {annotation_file} has no coco_url: use the annotation "
            "files of LVIS v1, or a config for COCO-format data."
        )
    return "/".join(parts[-2:])


def load_objects365(
    annotation_file: str,
    image_root: str,
    num_classes: int | None = None,
    invalid_boxes: str = "error",
) -> list[dict[str, Any]]:
    """Reads `zhiyuan_objv2_train.json` or `zhiyuan_objv2_val.json`; as `load_coco`.

    Args:
        image_root: directory that holds the unpacked archives `patch0`, `patch1`, ... The files
            name their images `images/v1/patch8/NAME.jpg`, of which only the last two parts are in
            the archives.
    """
    return load_coco(annotation_file, image_root, num_classes, invalid_boxes, _path_in_archives)


def _path_in_archives(image: dict[str, Any]) -> str:
    return "/".join(image.get("file_name", "").split("/")[-2:])
