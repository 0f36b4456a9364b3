"""Detections as a COCO-format json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

from co_detr.files import written_whole


class CocoResults:
    """Collects detections; `content` is an annotation file whose annotations have scores.

    The entries of ``annotations`` are those of COCO's result format too. Categories are numbered
    from 1 in the order of the checkpoint's classes, whose ids in the training data it does not
    know.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self._names = list(class_names)
        self._images: dict[int, dict[str, Any]] = {}
        self._found: dict[int, list[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self._images)

    def add(self, image_id: int, file_name: str, found: Instances, **details: Any) -> None:
        """Adds an image with its detections, on the CPU; `details` go to its image entry."""
        height, width = found.image_size
        self._images[image_id] = {
            "id": image_id,
            "file_name": file_name,
            "width": width,
            "height": height,
        } | details
        entries = instances_to_coco_json(found, image_id)
        for entry in entries:
            _, _, box_width, box_height = entry["bbox"]
            entry["category_id"] += 1
            entry |= {"area": box_width * box_height, "iscrowd": 0}
        self._found[image_id] = entries

    def content(self) -> dict[str, list[dict[str, Any]]]:
        """``images``, ``categories`` and ``annotations``, in the order of the image ids."""
        order = sorted(self._images)
        annotations = [entry for image_id in order for entry in self._found[image_id]]
        return {
            "images": [self._images[image_id] for image_id in order],
            "categories": [{"id": i, "name": name} for i, name in enumerate(self._names, start=1)],
            "annotations": [{"id": i} | entry for i, entry in enumerate(annotations, start=1)],
        }

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        with written_whole(str(path)) as file:
            json.dump(self.content(), file)
