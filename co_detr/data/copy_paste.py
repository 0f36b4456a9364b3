"""Copy-paste: objects of a second image are pasted into a training image by their masks.

Source: Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method", CVPR 2021, as the
reference's LSJ configs have it (``CopyPaste`` of mmdet 2, without blending).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import Tensor

from co_detr.data.augmentation import PixelwiseTransform, TransposeTransform
from co_detr.data.loader import CheckedDatasetMapper, as_tensor, augment, with_whole_masks
from co_detr.data.masks import CroppedMasks
from co_detr.mask_patch import MaskPatch, first_to_last
from co_detr.structures import loss_weights

Window = tuple[slice, slice]  # rows and columns


@dataclass(frozen=True)
class Scene:
    """An augmented training image: `image` (3, h, w), `instances` with `CroppedMasks`."""

    image: Tensor
    instances: Instances


@dataclass(frozen=True)
class CopyPaste:
    """Pastes objects of an image that is drawn from the whole data set, which may be the same.

    The second image is augmented like any other. A number from 0 to all (at most `max_pasted` - 1)
    is drawn, and so many of its objects are pasted. Nothing is pasted into or from an image with
    objects that have no masks. Of both images only the pixels are computed that show.

    Args:
        max_pasted: one more than the most objects that are pasted.
        pad_value: of the pixels where the second image is larger than the first; what the model
            pads with.
        keep_masks: whether a sample keeps its masks, for a head that learns them; None: as the
            model of the config needs.
    """

    max_pasted: int = 100
    pad_value: float = 114.0
    keep_masks: bool | None = None

    def __call__(
        self,
        record: dict[str, Any],
        records: Sequence[dict[str, Any]],
        mapper: CheckedDatasetMapper,
    ) -> dict[str, Any]:
        """The sample that a mapper makes of a record, with objects of another one.

        Draws from NumPy's generator, so that a sample depends on its seed alone.

        Args:
            records: of the data set.

        Raises:
            DataError: if an image cannot be read, or has another size than annotated.
        """
        first = draw_source(record, mapper)
        second = draw_source(records[np.random.randint(len(records))], mapper)
        chosen = self.draw(len(second.instances))
        scene = Scene(first.whole(), first.instances)
        if not len(scene.instances):
            size = scene.instances.image_size
            scene.instances.gt_masks = CroppedMasks.placed(size, ())
        has_masks = scene.instances.has("gt_masks") and second.instances.has("gt_masks")
        if len(chosen) and has_masks:
            objects = second.instances[torch.from_numpy(chosen)]
            scene = paste(scene, objects, second.pixels, self.pad_value)
        sample = {key: value for key, value in record.items() if key != "annotations"}
        instances = scene.instances
        if self.keep_masks:
            instances = with_whole_masks(instances)
        elif instances.has("gt_masks"):
            instances.remove("gt_masks")
        return sample | {"image": scene.image, "instances": instances}

    def draw(self, number: int) -> np.ndarray:
        """``(n,)`` int64: which of so many objects are pasted, in this order."""
        count = np.random.randint(0, min(number + 1, self.max_pasted))
        return np.random.choice(number, size=count, replace=False) if count else np.zeros(0, int)


def paste(
    scene: Scene,
    objects: Instances,
    pixels: Callable[[Window], Tensor],
    pad_value: float = 114.0,
    *,
    most_moved: float = 10.0,
    enough_left: int = 300,
) -> Scene:
    """Puts objects over a scene.

    Boxes of the scene are drawn anew around what is left of the masks. An object of the scene stays
    if no side of its box has moved by more than `most_moved` pixels, or if more than `enough_left`
    pixels of it are left. One of which nothing is left goes in any case; the reference keeps it
    with an empty box where that lies near the upper left corner of the image.

    Args:
        scene: is not changed.
        objects: with `gt_boxes`, `gt_classes` and `CroppedMasks` that all have pixels, in an image
            that begins at the same corner; they come behind those of the scene, and keep their
            boxes.
        pixels: gives ``(3, h, w)`` of a window of the image that the objects are in.
        pad_value: where that image is larger than the scene, which then grows to its size.
    """
    if not len(objects):
        return scene
    size = tuple(map(max, scene.instances.image_size, objects.image_size))
    covered = np.zeros(size, bool)
    for patch in objects.gt_masks.patches:
        covered[patch.window] |= patch.pixels
    window = first_to_last(covered.any(axis=1)), first_to_last(covered.any(axis=0))
    over = torch.from_numpy(covered[window])
    image = _enlarged(scene.image, size, pad_value)
    image[(..., *window)] = torch.where(over, pixels(window), image[(..., *window)])

    masks = CroppedMasks.placed(
        size,
        (
            MaskPatch(patch.left, patch.top, patch.pixels & ~covered[patch.window])
            for patch in scene.instances.gt_masks.patches
        ),
    )
    boxes = masks.boxes().tensor
    moved = (boxes - scene.instances.gt_boxes.tensor).abs().amax(dim=1)
    left = torch.tensor([patch.pixels.sum() for patch in masks.patches], dtype=torch.int64)
    stays = (left > 0) & ((moved <= most_moved) | (left > enough_left))
    instances = Instances(
        size,
        gt_boxes=Boxes(torch.cat([boxes[stays], objects.gt_boxes.tensor])),
        gt_classes=torch.cat([scene.instances.gt_classes[stays], objects.gt_classes]),
        gt_masks=CroppedMasks.cat([masks[stays], objects.gt_masks]),
    )
    if scene.instances.has("gt_weights") or objects.has("gt_weights"):
        kept = loss_weights(scene.instances)[stays]
        instances.gt_weights = torch.cat([kept, loss_weights(objects)])
    return Scene(image, instances)


def _enlarged(image: Tensor, size: tuple[int, int], value: float) -> Tensor:
    """A copy of ``(3, h, w)`` with `value` behind its rows and columns, ``(3, *size)``."""
    height, width = image.shape[1:]
    enlarged = image.new_empty(3, *size)
    enlarged[:, :height, :width] = image
    enlarged[:, height:] = enlarged[:, :height, width:] = value
    return enlarged


@dataclass(frozen=True)
class Source:
    """An augmented image whose pixels are only computed where they are asked for.

    Attributes:
        instances: what a mapper makes of its annotations.
        pixels: gives ``(3, h, w)`` uint8 of a window of the augmented image.
    """

    instances: Instances
    pixels: Callable[[Window], Tensor]

    def whole(self) -> Tensor:
        """All pixels."""
        height, width = self.instances.image_size
        return self.pixels((slice(0, height), slice(0, width)))


def draw_source(record: dict[str, Any], mapper: CheckedDatasetMapper) -> Source:
    """Augments an image without its pixels, if all its transforms can do without (`window_of`).

    Augmentations then see the shape of the image, and black in place of its pixels. With any other
    transform, which may depend on pixels, the image is read and augmented as a whole.

    Raises:
        DataError: as the mapper; of an image that cannot be read, when pixels are asked for.
    """
    name = f"image {record['file_name']}"
    before = record["height"], record["width"]
    shape = _ShapeOnly(_black(*before))
    state = np.random.get_state()
    try:
        transforms = augment(shape, mapper.augmentations, name)
    except _NeedsPixelsError:
        np.random.set_state(state)
        whole = T.AugInput(mapper.read(record))
        transforms = augment(whole, mapper.augmentations, name)
        after = whole.image.shape[:2]

        def pixels(window: Window) -> Tensor:
            return as_tensor(whole.image[window])

    else:
        after = shape.image.shape[:2]

        def pixels(window: Window) -> Tensor:
            return as_tensor(window_of(mapper.read(record), transforms, window))

    return Source(mapper.objects(record["annotations"], before, transforms, after), pixels)


_SAME_SHAPE = (T.HFlipTransform, T.VFlipTransform, T.NoOpTransform, PixelwiseTransform)


class _NeedsPixelsError(Exception):
    """A transform is none of those whose shape is known without pixels."""


class _ShapeOnly(T.AugInput):
    def transform(self, tfm: T.Transform) -> None:
        if isinstance(tfm, T.TransformList):
            for part in tfm.transforms:
                self.transform(part)
        elif isinstance(tfm, T.ResizeTransform):
            self.image = _black(tfm.new_h, tfm.new_w)
        elif isinstance(tfm, T.CropTransform):
            self.image = _black(tfm.h, tfm.w)
        elif isinstance(tfm, TransposeTransform):
            self.image = _black(*self.image.shape[1::-1])
        elif not isinstance(tfm, _SAME_SHAPE):
            raise _NeedsPixelsError


def _black(height: int, width: int) -> np.ndarray:
    """``(height, width, 3)`` uint8 that takes no memory."""
    return np.broadcast_to(np.zeros(3, np.uint8), (height, width, 3))


def window_of(rgb: np.ndarray, transforms: T.TransformList, window: Window) -> np.ndarray:
    """A window of ``transforms.apply_image(rgb)``, of which only that part is resized.

    Resizing a part rounds a few values (one in a hundred) to the other side: they differ by 1 or 2.

    Args:
        rgb: ``(H, W, 3)`` uint8.
        transforms: resizes, crops, mirrors, quarter turns, and changes of single pixels' colors.
        window: of the result.
    """
    rows, columns = window
    y, height = rows.start, rows.stop - rows.start
    x, width = columns.start, columns.stop - columns.start
    steps, behind = list(transforms.transforms), []
    source = None
    while steps and source is None:
        each = steps.pop()
        if isinstance(each, T.CropTransform):
            x, y = x + each.x0, y + each.y0
        elif isinstance(each, T.HFlipTransform):
            x = each.width - x - width
            behind.append(T.HFlipTransform(width))
        elif isinstance(each, T.VFlipTransform):
            y = each.height - y - height
            behind.append(T.VFlipTransform(height))
        elif isinstance(each, TransposeTransform):
            x, y, width, height = y, x, height, width
            behind.append(each)
        elif isinstance(each, PixelwiseTransform):
            behind.append(each)
        elif isinstance(each, T.ResizeTransform):
            whole = T.TransformList(steps).apply_image(rgb)
            down, across = each.h / each.new_h, each.w / each.new_w
            box = (x * across, y * down, (x + width) * across, (y + height) * down)
            box = (*box[:2], min(box[2], each.w), min(box[3], each.h))
            picture = Image.fromarray(whole).resize((width, height), each.interp, box)
            source = np.asarray(picture)
    if source is None:
        source = rgb[y : y + height, x : x + width]
    for transform in reversed(behind):
        source = transform.apply_image(source)
    return source
