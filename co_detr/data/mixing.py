"""Mosaic and MixUp: training samples made of several images, until an iteration near the end.

Both are geometry of single images: each is moved to its place by a chain of transforms, its boxes
and masks go through the same chain as its pixels, and an object stays as long as some of it shows.
Sources: Mosaic as in mmdet (``Mosaic``; first in YOLOv4, Bochkovskiy et al., 2020), MixUp and the
end of both before the training's in YOLOX (Ge et al., 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from co_detr.data.augmentation import PlaceTransform
from co_detr.data.copy_paste import draw_source, window_of
from co_detr.data.loader import CheckedDatasetMapper, as_tensor, augment, with_whole_masks
from co_detr.data.masks import CroppedMasks
from co_detr.errors import ConfigError, require_share, require_whole
from co_detr.mask_patch import MaskPatch
from co_detr.structures import loss_weights

Record = dict[str, Any]
Sample = dict[str, Any]


@dataclass(frozen=True)
class Mixing:
    """Makes samples of several images that are drawn from the whole data set.

    Both draw for every sample whether they happen to it; a mosaic may be mixed, too. With both at 0
    samples are those without.

    Args:
        mosaic: how often four images become one, around a point drawn in the middle of a canvas
            whose sides are twice `size`. What of the canvas shows is then augmented as any image.
        mixup: how often an image is blended half and half with a second one, which is augmented in
            the same way, at a place drawn at random. Objects of both are learned.
        size: of a mosaic: the longer side in pixels that its images are resized to.
        shown: of a mosaic: (min, max) share of the canvas' side that is cut out at random. mmdet
            shows all of it and leaves the cut to a transform behind; images that are cut away here
            are not even read.
        until: share of the training after which samples are single images again, so that it ends
            on what the model will see.
        max_iter: of the training (``${train.max_iter}``).
        pad_value: of pixels where no image is.
        keep_masks: whether samples keep their masks, for a head that learns them; None: as the
            model of the config needs.

    Raises:
        ConfigError: if a value is out of its range.
    """

    mosaic: float = 0.0
    mixup: float = 0.0
    size: int = 640
    shown: tuple[float, float] = (0.5, 1.0)
    until: float = 0.85
    max_iter: int = 0
    pad_value: float = 114.0
    keep_masks: bool | None = None

    def __post_init__(self) -> None:
        for name in ("mosaic", "mixup", "until"):
            require_share(f"dataloader.train.mixing.{name}", getattr(self, name))
        require_whole("dataloader.train.mixing.size", self.size, least=2)
        if len(self.shown) != 2 or not 0 < self.shown[0] <= self.shown[1] <= 1:
            raise ConfigError(
                f"dataloader.train.mixing.shown={self.shown} must be the smallest and the largest "
                "share, above 0 and up to 1."
            )

    @property
    def is_on(self) -> bool:
        return self.stop_iteration > 0 and (self.mosaic > 0 or self.mixup > 0)

    @property
    def stop_iteration(self) -> int:
        """The first iteration whose samples are single images."""
        return round(self.until * self.max_iter)

    def __str__(self) -> str:
        return (
            f"Mosaic in {self.mosaic:.0%}, MixUp in {self.mixup:.0%} of the samples; from "
            f"iteration {self.stop_iteration} of {self.max_iter} on, samples are single images."
        )

    def __call__(
        self,
        record: Record,
        records: Sequence[Record],
        mapper: CheckedDatasetMapper,
        unmixed: Callable[[Record], Sample],
    ) -> Sample:
        """The sample of a record, with others. Draws from NumPy's generator.

        Args:
            records: of the data set.
            unmixed: makes the sample of a record that becomes no mosaic.

        Raises:
            DataError: as the mapper.
        """
        is_mosaic, is_mixed = np.random.uniform(size=2) < (self.mosaic, self.mixup)
        if is_mosaic:
            others = [_drawn(records) for _ in range(3)]
            sample = self.draw_mosaic([record, *others], mapper)
        else:
            sample = unmixed(record)
        if is_mixed:
            sample = self.mix(sample, _drawn(records), mapper)
        if not self.keep_masks and sample["instances"].has("gt_masks"):
            sample["instances"].remove("gt_masks")
        return sample

    def draw_mosaic(self, records: Sequence[Record], mapper: CheckedDatasetMapper) -> Sample:
        """The sample of the first record, with three others beside and below it."""
        side = 2 * self.size
        center_x, center_y = np.random.uniform(0.5, 1.5, 2) * self.size
        center = round(center_x), round(center_y)
        shown = max(1, round(np.random.uniform(*self.shown) * side))
        corner = tuple(np.random.randint(0, side - shown + 1, 2).tolist())
        tiles = [
            (record, steps)
            for record, place in zip(records, ("lt", "rt", "lb", "rb"), strict=True)
            if (steps := self._tile(record, place, center, corner, shown)) is not None
        ]
        canvas = np.full((shown, shown, 3), self.pad_value, np.uint8)
        for record, (*resizes, put) in tiles:
            pixels = mapper.read(record)
            canvas[put.target] = window_of(pixels, T.TransformList(resizes), put.source)
        augmented = T.AugInput(canvas)
        name = f"the mosaic of image {records[0]['file_name']}"
        transforms = augment(augmented, mapper.augmentations, name)
        after = augmented.image.shape[:2]
        parts = [
            mapper.objects(
                record["annotations"],
                (record["height"], record["width"]),
                T.TransformList([*steps, *transforms.transforms]),
                after,
            )
            for record, steps in tiles
        ]
        sample = {key: value for key, value in records[0].items() if key != "annotations"}
        sample["image"] = as_tensor(augmented.image)
        sample["instances"] = with_whole_masks(joined(parts, after))
        return sample

    def _tile(
        self,
        record: Record,
        place: str,
        center: tuple[int, int],
        corner: tuple[int, int],
        shown: int,
    ) -> list[T.Transform] | None:
        """How an image gets to its quarter of the canvas: a resize, if it has another size, and a
        `PlaceTransform`. None: nothing of it shows.

        Args:
            place: left or right, and top or bottom, of the center.
            corner: (x, y) of what shows of the canvas, a square of `shown` pixels.
        """
        height, width = record["height"], record["width"]
        scale = self.size / max(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        start = [
            middle - (length if letter in "lt" else 0) - first
            for middle, length, letter, first in zip(center, size[::-1], place, corner, strict=True)
        ]
        low = [min(max(first, 0), shown) for first in start]
        high = [
            min(max(first + length, 0), shown)
            for first, length in zip(start, size[::-1], strict=True)
        ]
        if low[0] >= high[0] or low[1] >= high[1]:
            return None
        put = PlaceTransform(tuple(start), (*low, *high), (shown, shown), self.pad_value)
        is_resized = size != (height, width)
        return [*([T.ResizeTransform(height, width, *size)] if is_resized else []), put]

    def mix(self, sample: Sample, other: Record, mapper: CheckedDatasetMapper) -> Sample:
        """A sample that is blended with the image of another record."""
        first, second = sample["instances"], draw_source(other, mapper)
        size, own = first.image_size, second.instances.image_size
        # Somewhere inside, or, where it is larger, so that it covers everything.
        down, right = (
            np.random.randint(min(0, room), max(0, room) + 1)
            for room in (size[0] - own[0], size[1] - own[1])
        )
        window = (
            *(max(right, 0), max(down, 0)),
            *(min(right + own[1], size[1]), min(down + own[0], size[0])),
        )
        put = PlaceTransform((right, down), window, size)
        above = torch.full_like(sample["image"], self.pad_value)
        above[(..., *put.target)] = second.pixels(put.source)
        moved = _placed(second.instances, put, mapper.recompute_boxes)
        return sample | {
            "image": half_and_half(sample["image"], above),
            "instances": joined([first, with_whole_masks(moved)], size),
        }


def _drawn(records: Sequence[Record]) -> Record:
    return records[np.random.randint(len(records))]


def half_and_half(one: Tensor, other: Tensor) -> Tensor:
    """The mean of two uint8 images, rounded down, without a wider type."""
    return (one >> 1) + (other >> 1) + (one & other & 1)


def _placed(instances: Instances, put: PlaceTransform, recompute_boxes: bool) -> Instances:
    """The objects of an augmented image that show on the canvas that it is put on.

    Args:
        recompute_boxes: whether boxes are drawn anew around the masks, as of a mapper.
    """
    boxes = instances.gt_boxes.tensor.double().reshape(-1, 2).numpy()
    boxes = torch.from_numpy(put.apply_coords(boxes)).float().reshape(-1, 4)
    placed = Instances(put.size, gt_boxes=Boxes(boxes), gt_classes=instances.gt_classes)
    if instances.has("gt_weights"):
        placed.gt_weights = instances.gt_weights
    shows = placed.gt_boxes.nonempty(threshold=1e-5)
    if instances.has("gt_masks"):
        rows, columns = put.source
        right, down = put.shift
        patches = []
        for patch in instances.gt_masks.patches:
            above, before = max(rows.start - patch.top, 0), max(columns.start - patch.left, 0)
            below, behind = max(rows.stop - patch.top, 0), max(columns.stop - patch.left, 0)
            shown = patch.pixels[above:below, before:behind]
            patches.append(MaskPatch(patch.left + before + right, patch.top + above + down, shown))
        placed.gt_masks = CroppedMasks.placed(put.size, patches)
        around = placed.gt_masks.boxes()
        shows &= around.nonempty()
        if recompute_boxes:
            placed.gt_boxes = around
    return placed[shows]


def joined(parts: Sequence[Instances], size: tuple[int, int]) -> Instances:
    """The objects of several images in one, with masks if all that have objects have masks, and
    with weights if any has some.

    Args:
        parts: of images of this size.
        size: (height, width) in pixels.
    """
    filled = [part for part in parts if len(part)]
    if not filled:
        boxes, classes = Boxes(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.int64)
        return Instances(size, gt_boxes=boxes, gt_classes=classes)
    if any(part.has("gt_weights") for part in filled):
        for part in filled:
            part.gt_weights = loss_weights(part)
    with_masks = all(part.has("gt_masks") for part in filled)
    for part in filled:
        if part.has("gt_masks") and not with_masks:
            part.remove("gt_masks")
    return Instances.cat(filled)
