"""Golden files of the reference, and the cases in them: inputs, weights and expected values.

A file holds nested dicts, lists and tensors, as ``.pt`` or as xz-compressed ``.pt.xz``.
"""

from __future__ import annotations

import io
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

from co_detr.modeling.geometry import ImageBatch
from tests.parity.oracle.instance_case import (
    LEFT_OUT,
    LEFT_OUT_OF_VARIANTS,
    completed,
    is_instance_case,
)

SUFFIXES = (".pt", ".pt.xz")

# What files with a base case leave out, as its inputs or because it depends on no ground truth.
VARIANT_DROPS = (
    "eval",
    "batch",
    "images_uint8_rgb",
    "train.atss.anchors",
    "train.atss.bbox_deltas",
    "train.atss.centerness",
    "train.atss.cls_logits",
    "train.atss.targets.bbox_targets",
    "train.atss.targets.labels",
    "train.atss.valid_flags",
    "train.roi.feats_first8",
    "train.roi.feats_mean",
    "train.rpn.anchors",
    "train.rpn.deltas",
    "train.rpn.objectness",
    "train.rpn.targets.delta_targets",
    "train.rpn.valid_flags",
)

# What any file may leave out to save room.
BULKY = ("eval.pos_encodings", "eval.enc_output_memory")


def golden_files(directory: Path) -> list[Path]:
    """All golden files of a folder, by name."""
    return sorted(p for p in directory.iterdir() if p.is_file() and p.name.endswith(SUFFIXES))


def find_golden(directory: Path, stem: str) -> Path:
    """The file ``<stem>.pt`` or ``<stem>.pt.xz`` of a folder.

    Raises:
        FileNotFoundError: naming both.
    """
    for suffix in SUFFIXES:
        if (path := directory / f"{stem}{suffix}").exists():
            return path
    raise FileNotFoundError(
        f"{directory} holds neither {stem}.pt nor {stem}.pt.xz; copy the file that belongs to it."
    )


def load_golden(path: Path) -> dict[str, Any]:
    """The content of a golden file; no code in it is run."""
    content = path.read_bytes()
    if path.name.endswith(".xz"):
        content = lzma.decompress(content)
    return torch.load(io.BytesIO(content), weights_only=True)


def save_golden(content: dict[str, Any], path: Path) -> None:
    """Writes ``content``, compressed if the name ends in ``.xz``."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    path.write_bytes(lzma.compress(data, preset=9) if path.name.endswith(".xz") else data)


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested dicts, lists and tuples by dotted name; lists of numbers are leaves."""
    if isinstance(value, dict):
        items = [(f"{name}.{key}" if name else str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list | tuple) and any(_nested(inner) for inner in value):
        items = [(f"{name}[{index}]", inner) for index, inner in enumerate(value)]
    else:
        return {name: value}
    return {leaf: found for key, inner in items for leaf, found in flatten(inner, key).items()}


def _nested(value: Any) -> bool:
    return isinstance(value, Tensor | dict | list | tuple)


@dataclass(frozen=True)
class Case:
    """One file; a variant takes weights and inputs of its base case.

    A case may come without the weights of backbone and neck. Then it starts at the recorded
    output of the neck, ``eval.neck_feats``.

    Attributes:
        own: the entries of the file itself, which must be accounted for.
        base: the content of the base case, or of the file itself.
    """

    own: dict
    base: dict

    @classmethod
    def of(cls, own: dict, directory: Path) -> Case:
        """Completes a file's content by its base case, ``meta.base_case``, if it names one.

        Raises:
            FileNotFoundError: naming the base file that ``directory`` lacks.
        """
        name = own["meta"].get("base_case")
        base = own if name is None else load_golden(find_golden(directory, f"case_{name}"))
        if is_instance_case(own):
            own, base = completed(own), completed(base)
        return cls(own, own if name is None else base)

    @property
    def meta(self) -> dict:
        return self.own["meta"]

    @property
    def is_dino(self) -> bool:
        """Whether the model is a Co-DINO (kinds B and M) and not a Co-Deformable-DETR (kind A)."""
        return self.kind != "A"

    @property
    def kind(self) -> str:
        """A, B, or M: instance segmentation, whose files do not say it."""
        return "M" if is_instance_case(self.own) else self.meta["kind"]

    @property
    def is_zero_padded(self) -> bool:
        """Whether short groups of positive queries were filled with zeros."""
        queries = self.own.get("train", {}).get("aux", [])
        return any(query["attn_masks"] is not None for query in queries)

    @property
    def padding(self) -> str:
        """How ``PositiveQueries`` fills short groups to do the same."""
        if not self.is_zero_padded:
            return "negatives"
        # The reference's Co-DINO makes the mask but does not use it.
        return "unmasked" if self.is_dino else "mask"

    @property
    def max_detections(self) -> int:
        """Detections that the reference keeps of an image, which only their number may tell."""
        if self.kind == "M":
            return self.meta["config"]["test_cfg"][0]["max_per_img"]
        lists = ("det_no_nms", "det_no_nms_rescaled")
        found = [entry for name in lists for entry in self.base.get("eval", {}).get(name, [])]
        return max((len(image["labels"]) for image in found), default=100)

    @property
    def weights(self) -> dict[str, Tensor]:
        """By the reference's names."""
        return self.base["state_dict"]

    @property
    def num_classes(self) -> int:
        return self.meta["num_classes"]

    @property
    def num_gts(self) -> list[int]:
        """Ground truths per image."""
        return [len(labels) for labels in self.own["gt_labels"]]

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """Un-padded (height, width) in pixels."""
        return [(int(height), int(width)) for height, width in self.own["image_sizes_hw"]]

    @property
    def has_backbone(self) -> bool:
        return any(key.startswith("backbone.") for key in self.weights)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Entries that the file may lack: those it says, and those that no such file has."""
        named = (*self.meta.get("dropped", ()), *BULKY)
        if self.kind == "M":
            named = (*named, *LEFT_OUT)
        if self.own is self.base:
            return named
        own = LEFT_OUT_OF_VARIANTS if self.kind == "M" else ()
        return (*named, *VARIANT_DROPS, *own)

    def images(self) -> ImageBatch:
        """The padded network input; without a backbone only its shape means anything."""
        if self.has_backbone:
            return ImageBatch(self.base["batch"], self.image_sizes)
        height, width = (max(sides) for sides in zip(*self.image_sizes, strict=True))
        shape = (len(self.image_sizes), 3, height, width)
        return ImageBatch(torch.zeros(1).expand(shape), self.image_sizes)

    def ground_truth(self) -> list[Instances]:
        truth = [
            Instances(size, gt_boxes=Boxes(boxes), gt_classes=labels)
            for size, boxes, labels in zip(
                self.image_sizes, self.own["gt_boxes_xyxy"], self.own["gt_labels"], strict=True
            )
        ]
        for instances, masks in zip(truth, self.own.get("gt_masks", ()), strict=False):
            instances.gt_masks = BitMasks(masks.bool())
        return truth
