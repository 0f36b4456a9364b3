"""Files of detections become one list: scores are rescaled, detections of each image fused."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from co_detr.data.coco_file import Entry
from co_detr.errors import ConfigError
from co_detr.modeling.fusion import Fusion, NmsFusion, SoftNmsFusion, WeightedBoxesFusion
from co_detr.tools.results import DetectionFile, ImageId, by_image, corners, with_score

_FUSIONS: dict[str, Callable[[float], Fusion]] = {
    "nms": NmsFusion,
    "soft-nms": SoftNmsFusion,
    "wbf": WeightedBoxesFusion,
    "wbf-max": partial(WeightedBoxesFusion, score="max"),
}


@dataclass(frozen=True)
class Settings:
    """How files become one.

    Attributes:
        rule: one of `co_detr.tools.combine.RULES`.
        iou: overlap that the rule goes by, in (0, 1].
        weights: trust in each file, above 0; only ratios count.
        temperatures: of each file; its scores become sigmoid(logit(score) / temperature), which
            brings them nearer to 0.5 above 1.

    Raises:
        ConfigError: if a number is out of its range.
    """

    rule: str
    iou: float
    weights: tuple[float, ...]
    temperatures: tuple[float, ...]

    def __post_init__(self) -> None:
        self.fusion()  # knows what IoUs can be
        for name in ("weights", "temperatures"):
            values = getattr(self, name)
            if not all(0 < value < math.inf for value in values):
                shown = " ".join(f"{value:g}" for value in values)
                raise ConfigError(f"--{name} {shown}: all must be above 0.")

    def fusion(self) -> Fusion:
        return _FUSIONS[self.rule](self.iou)

    def without(self, number: int) -> Settings:
        """Those of the other files."""
        weights, temperatures = (
            values[:number] + values[number + 1 :] for values in (self.weights, self.temperatures)
        )
        return replace(self, weights=weights, temperatures=temperatures)

    def text(self, number: int) -> str:
        """Flags that say the same, of so many files."""
        weights, temperatures = (
            " ".join(f"{value:g}" for value in values)
            for values in (self.weights, self.temperatures)
        )
        rule = f"--rule {self.rule} --iou {self.iou:g} --weights {weights}"
        parts = [rule if number > 1 else "one source: nothing to fuse"]
        parts += [f"--temperatures {temperatures}"] * any(t != 1 for t in self.temperatures)
        return " ".join(parts)


def combined(
    sources: Sequence[DetectionFile],
    settings: Settings,
    images: Collection[ImageId] | None = None,
    fuse_one: bool = False,
) -> list[Entry]:
    """Detections of all files as one list, by image, the best first.

    A single source is not fused: its entries stay as they are, in their order.

    Args:
        images: to look at; None: all.
        fuse_one: apply the rule to a single source, too, as a fair comparison wants it.
    """
    scaled = [
        [with_score(entry, scaled_score(entry["score"], temperature)) for entry in source.entries]
        if temperature != 1
        else source.entries
        for source, temperature in zip(sources, settings.temperatures, strict=True)
    ]
    if images is not None:
        scaled = [[e for e in entries if e["image_id"] in images] for entries in scaled]
    if len(sources) == 1 and not fuse_one:
        return list(scaled[0])
    grouped = [by_image(entries) for entries in scaled]
    order = dict.fromkeys(image for found in grouped for image in found)
    fusion = settings.fusion()
    return [
        entry
        for image in order
        for entry in _fused([found.get(image, []) for found in grouped], fusion, settings.weights)
    ]


def _fused(lists: Sequence[list[Entry]], fusion: Fusion, weights: Sequence[float]) -> list[Entry]:
    """Detections of one image."""
    every = [entry for entries in lists for entry in entries]
    categories = list(dict.fromkeys(entry["category_id"] for entry in every))
    number = {category: index for index, category in enumerate(categories)}
    instances = [_instances(entries, number) for entries in lists]
    found = fusion.fuse(instances, weights)
    # Rules that choose leave boxes as they are: these are the same detections, with their masks.
    originals: dict[tuple[float, ...], Entry] = {}
    for entries, own in zip(lists, instances, strict=True):
        for entry, box in zip(entries, own.pred_boxes.tensor.tolist(), strict=True):
            key = (number[entry["category_id"]], *box)
            if key not in originals or entry["score"] > originals[key]["score"]:
                originals[key] = entry
    fused = []
    for box, score, label in zip(
        found.pred_boxes.tensor.tolist(),
        found.scores.tolist(),
        found.pred_classes.tolist(),
        strict=True,
    ):
        original = originals.get((label, *box))
        if original is None:
            x0, y0, x1, y1 = box
            entry = {"image_id": every[0]["image_id"], "category_id": categories[label]}
            fused.append(entry | {"bbox": [x0, y0, x1 - x0, y1 - y0], "score": score})
        elif np.float32(original["score"]) == np.float32(score):
            fused.append(original)
        else:
            fused.append(with_score(original, score))
    return fused


def _instances(entries: Sequence[Entry], number: Mapping[int | str, int]) -> Instances:
    boxes = torch.from_numpy(corners(entries)).float()
    return Instances(
        (1, 1),  # no rule asks for the size of the image
        pred_boxes=Boxes(boxes),
        scores=torch.tensor([entry["score"] for entry in entries], dtype=torch.float32),
        pred_classes=torch.tensor(
            [number[entry["category_id"]] for entry in entries], dtype=torch.int64
        ),
    )


def scaled_score(score: float, temperature: float) -> float:
    """sigmoid(logit(score) / temperature); 0 and 1 stay."""
    if not 0 < score < 1:
        return score
    return 1 / (1 + ((1 - score) / score) ** (1 / temperature))
