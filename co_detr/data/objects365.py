"""Objects365 v2: two million images with 365 classes."""

from __future__ import annotations

from typing import Any

from co_detr.data.coco import load_coco


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
