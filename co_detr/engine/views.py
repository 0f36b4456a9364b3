"""Several views of one image, and one list of detections: test-time augmentation and tiles.

A view is a part of an image, at a size, mirrored or not. The model sees each of them as an image of
its own; its detections are brought back to the pixels of the whole image, and fused there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import detectron2.data.transforms as T
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from omegaconf import DictConfig
from torch import Tensor, nn

from co_detr.data.loader import CheckedDatasetMapper, as_tensor, augment
from co_detr.errors import ConfigError
from co_detr.modeling.detectors import TTA_KIND
from co_detr.modeling.fusion import Fusion, NmsFusion, SoftNmsFusion
from co_detr.modeling.losses import iou
from co_detr.modeling.postprocess import DetectedMasks

# A box that ends within this share of a tile's side from its border may go on behind it.
_BORDER = 0.02
# A part of an object gives way to the whole one if that covers so much of it ...
_COVERED = 0.8
# ... and has this share of its score: low scores are everywhere in the detections of a DETR.
_TRUSTED = 0.5
# IoU from which on two detections of one class have a mask in common.
_SAME_OBJECT = 0.5


@dataclass(frozen=True)
class View:
    """One way in which the model sees an image.

    Attributes:
        region: (left, top, right, bottom) in whole pixels of the image.
        scale: of the network input, in sizes that the evaluation would give the region.
        mirror: left and right are exchanged.
        smallest, largest: detections of another size are left out; square root of their area, in
            pixels of the network input.
    """

    region: tuple[int, int, int, int]
    scale: float = 1.0
    mirror: bool = False
    smallest: float = 0.0
    largest: float = math.inf

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the region."""
        left, top, right, bottom = self.region
        return bottom - top, right - left

    def network_input(self, pixels: np.ndarray, resize: T.Augmentation, name: str) -> Tensor:
        """The image ``(3, h, w)`` that the model sees.

        Args:
            pixels: ``(H, W, 3)`` uint8 of the whole image, in the color order of the model.
            resize: of the evaluation.
            name: of the image, for messages.

        Raises:
            DataError: if it cannot be resized.
        """
        left, top, right, bottom = self.region
        part = pixels[top:bottom, left:right]
        # Before the resize: what is mirrored twice is then the same to the last bit.
        part = np.ascontiguousarray(part[:, ::-1] if self.mirror else part)
        seen = T.AugInput(part)
        augment(seen, resize, name)
        if self.scale != 1:
            sides = [max(1, round(self.scale * side)) for side in seen.image.shape[:2]]
            seen = T.AugInput(part)
            augment(seen, T.AugmentationList([T.ResizeTransform(*part.shape[:2], *sides)]), name)
        return as_tensor(seen.image)

    def to_image(self, found: Instances, image_size: tuple[int, int]) -> Instances:
        """Detections in pixels of the region as detections in pixels of the image."""
        result = Instances(image_size, **found.get_fields())
        result.pred_boxes = Boxes(self._boxes_to_image(found.pred_boxes.tensor))
        if found.has("pred_masks"):
            masks = found.pred_masks
            result.pred_masks = DetectedMasks(
                masks.probabilities.flip(-1) if self.mirror else masks.probabilities,
                self._boxes_to_image(masks.boxes),
                image_size,
                masks.threshold,
            )
        return result

    def _boxes_to_image(self, boxes: Tensor) -> Tensor:
        """Corners ``(N, 4)`` of the region -> of the image."""
        left, top, _, _ = self.region
        if self.mirror:
            x1, y1, x2, y2 = boxes.unbind(1)
            boxes = torch.stack([self.size[1] - x2, y1, self.size[1] - x1, y2], dim=1)
        return boxes + boxes.new_tensor([left, top, left, top])


def whole(image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The region that is the whole image of (height, width)."""
    return (0, 0, image_size[1], image_size[0])


class ViewPlan(Protocol):
    """Which views of an image there are, and how their detections become one list."""

    def views(self, image_size: tuple[int, int]) -> list[View]:
        """At least one, of an image of (height, width)."""
        ...

    def fuse(self, views: Sequence[View], found: Sequence[Instances]) -> Instances:
        """One list, best first, of the detections of each view in pixels of the whole image."""
        ...


@dataclass(frozen=True)
class TTA:
    """Test-time augmentation: the whole image at several sizes, each also mirrored.

    An image keeps as many detections as the longest of the lists had. Detectron2's convention:
    ``GeneralizedRCNNWithTTA``, ``DatasetMapperTTA``.

    Attributes:
        scales: sizes of the network input, in sizes of the evaluation.
        mirror: whether there is a mirrored view of each size.
        smallest, largest: for each of the scales, which detections it keeps, see `View`; None: all.
            Small views are for large objects.
        fusion: of the views.

    Raises:
        ConfigError: if scales are missing, not above 0, or not as many as the sizes.
    """

    scales: Sequence[float] = (1.0,)
    mirror: bool = True
    smallest: Sequence[float] | None = None
    largest: Sequence[float] | None = None
    fusion: Fusion = field(default_factory=SoftNmsFusion)

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ConfigError(
                f"scales={list(self.scales)} of the test-time augmentation must be numbers above "
                "0, where 1 is the size of the evaluation."
            )
        for name in ("smallest", "largest"):
            sizes = getattr(self, name)
            if sizes is not None and len(sizes) != len(self.scales):
                raise ConfigError(
                    f"the test-time augmentation has {len(self.scales)} scales but {len(sizes)} "
                    f"{name} sizes: give one for each, or null."
                )

    def views(self, image_size: tuple[int, int]) -> list[View]:
        smallest = self.smallest or [0.0] * len(self.scales)
        largest = self.largest or [math.inf] * len(self.scales)
        return [
            View(whole(image_size), scale, mirror, low, high)
            for scale, low, high in zip(self.scales, smallest, largest, strict=True)
            for mirror in ((False, True) if self.mirror else (False,))
        ]

    def fuse(self, views: Sequence[View], found: Sequence[Instances]) -> Instances:
        return _fused(self.fusion, found, max(map(len, found)))


PRESETS = {
    "flip": TTA(),
    "multiscale": TTA(scales=(0.75, 1.0, 1.25), smallest=(64.0, 0.0, 0.0)),
}


def named_tta(value: Any, key: str) -> TTA | None:
    """The plan that a setting asks for.

    Args:
        value: a name of `PRESETS`, a `TTA` or the config node of one, or None.
        key: of the setting, for messages.

    Raises:
        ConfigError: if it is something else.
    """
    plan = instantiate(value) if isinstance(value, DictConfig) else value
    plan = PRESETS.get(plan, plan) if isinstance(plan, str) else plan
    if plan is not None and not isinstance(plan, TTA):
        raise ConfigError(
            f"{key}={value} is no test-time augmentation: choose {', '.join(PRESETS)}, a "
            "co_detr.engine.views.TTA, or null."
        )
    return plan


@dataclass(frozen=True)
class Tiles:
    """Overlapping parts of an image, each seen at the size of the evaluation, and the whole of it.

    An image that is not larger than a tile is seen once, as without tiles. Parts of objects give
    way to the whole ones: what ends at a border of its tile inside of the image is left out if a
    detection of the same class from another view, which does not, covers most of it.

    Attributes:
        size: side of a tile in pixels of the image; a side of the image that is shorter is not cut.
        overlap: of neighbors, as a share of the side, from 0 to below 1; the least, as tiles are
            spread evenly. Objects should fit in it.
        full_image: whether the whole image is one more view, for objects larger than a tile.
        fusion: of the views.

    Raises:
        ConfigError: if size or overlap is out of its range.
    """

    size: int = 640
    overlap: float = 0.2
    full_image: bool = True
    fusion: Fusion = field(default_factory=NmsFusion)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"tiles of {self.size} pixels cannot be cut: give at least 1.")
        if not 0 <= self.overlap < 1:
            raise ConfigError(
                f"the overlap {self.overlap} of tiles must be a share from 0 to below 1."
            )

    def regions(self, image_size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
        """(left, top, right, bottom) of each tile, row after row, all of one size."""
        height, width = image_size
        return [
            (left, top, min(left + self.size, width), min(top + self.size, height))
            for top in self._starts(height)
            for left in self._starts(width)
        ]

    def _starts(self, length: int) -> list[int]:
        room = max(0, length - self.size)
        steps = math.ceil(room / max(1.0, self.size * (1 - self.overlap)))
        return [round(room * step / max(1, steps)) for step in range(steps + 1)]

    def views(self, image_size: tuple[int, int]) -> list[View]:
        regions = self.regions(image_size)
        if self.full_image and len(regions) > 1:
            regions.append(whole(image_size))
        return [View(region) for region in regions]

    def fuse(self, views: Sequence[View], found: Sequence[Instances]) -> Instances:
        if len(found) > 1:
            found = _without_parts(views, found)
        return _fused(self.fusion, found, sum(map(len, found)))


def _without_parts(views: Sequence[View], found: Sequence[Instances]) -> list[Instances]:
    """The detections of each tile without those of which another one has the whole; see `Tiles`."""
    cut = [_is_cut(view.region, own) for view, own in zip(views, found, strict=True)]
    kept = []
    for number, own in enumerate(found):
        others = [
            other[~parts]
            for index, (other, parts) in enumerate(zip(found, cut, strict=True))
            if index != number
        ]
        boxes = torch.cat([other.pred_boxes.tensor for other in others])
        scores = torch.cat([other.scores for other in others])
        classes = torch.cat([other.pred_classes for other in others])
        corners = own.pred_boxes.tensor[:, None]
        sides = torch.minimum(corners[..., 2:], boxes[:, 2:]) - torch.maximum(
            corners[..., :2], boxes[:, :2]
        )
        covered = sides.clamp(min=0).prod(-1) >= _COVERED * own.pred_boxes.area()[:, None]
        same = own.pred_classes[:, None] == classes
        trusted = scores >= _TRUSTED * own.scores[:, None]
        kept.append(own[~(cut[number] & (covered & same & trusted).any(1))])
    return kept


def _is_cut(region: tuple[int, int, int, int], found: Instances) -> Tensor:
    """``(N,)``: which boxes end at a border of their region that is none of the image."""
    left, top, right, bottom = region
    height, width = found.image_size
    near_x, near_y = _BORDER * (right - left), _BORDER * (bottom - top)
    x1, y1, x2, y2 = found.pred_boxes.tensor.unbind(1)
    return (
        (x1 < left + near_x) & (left > 0)
        | (y1 < top + near_y) & (top > 0)
        | (x2 > right - near_x) & (right < width)
        | (y2 > bottom - near_y) & (bottom < height)
    )


def _fused(fusion: Fusion, found: Sequence[Instances], most: int) -> Instances:
    """The best ``most`` of the views; those of a single view are its own."""
    if len(found) == 1:
        return found[0]
    fused = fusion.fuse(found)[:most]
    return _with_masks(fused, found) if found[0].has("pred_masks") else fused


def _with_masks(fused: Instances, views: Sequence[Instances]) -> Instances:
    """Fused boxes with the mean mask of their detections.

    Each view gives the mask of its detection of the same class that overlaps the fused box most,
    if by enough; the view that overlaps it most gives one in any case. Probabilities are sampled at
    the cells of the fused box, and are 0 outside of a detection's own.
    """
    boxes = fused.pred_boxes.tensor
    overlaps, rows = [], []
    for found in views:
        overlap = iou(boxes[:, None], found.pred_boxes.tensor[None])
        same = fused.pred_classes[:, None] == found.pred_classes
        overlap = torch.where(same, overlap, -1.0)
        # A view without detections has none that could be the best.
        none = overlap.new_full((len(boxes), 1), -1.0)
        best = torch.cat([overlap, none], dim=1).max(1)
        overlaps.append(best.values)
        rows.append(best.indices)
    table = torch.stack(overlaps)  # (views, N)
    votes = (table >= _SAME_OBJECT) | (table == table.max(0).values)
    masks = views[0].pred_masks
    side = masks.probabilities.shape[-1]
    total = masks.probabilities.new_zeros(len(fused), side, side)
    quality = boxes.new_zeros(len(fused))
    judged = all(found.has("mask_scores") for found in views)
    for found, vote, row in zip(views, votes, rows, strict=True):
        chosen = vote.nonzero().squeeze(1)
        own = found[row[chosen]]
        total[chosen] += _resampled(own.pred_masks, boxes[chosen])
        if judged:
            quality[chosen] += own.mask_scores / own.scores.clamp(min=1e-9)
    numbers = votes.sum(0)
    fused.pred_masks = DetectedMasks(
        total / numbers[:, None, None], boxes.clone(), fused.image_size, masks.threshold
    )
    if judged:
        fused.mask_scores = fused.scores * quality / numbers
    return fused


def _resampled(masks: DetectedMasks, boxes: Tensor) -> Tensor:
    """Probabilities ``(N, S, S)`` of masks at the cells of other boxes ``(N, 4)``."""
    side = masks.probabilities.shape[-1]
    cells = (torch.arange(side, device=boxes.device) + 0.5) / side
    sizes = (masks.boxes[:, 2:] - masks.boxes[:, :2]).clamp(min=1e-6)
    starts = (boxes[:, :2] - masks.boxes[:, :2]) / sizes
    ratios = (boxes[:, 2:] - boxes[:, :2]) / sizes
    places = 2 * (starts[:, None] + ratios[:, None] * cells[:, None]) - 1  # (N, S, 2)
    x, y = places.unbind(-1)
    grid = torch.stack([x[:, None].expand(-1, side, -1), y[..., None].expand(-1, -1, side)], -1)
    values = F.grid_sample(masks.probabilities[:, None].float(), grid, align_corners=False)
    return values[:, 0].to(masks.probabilities.dtype)


@dataclass(frozen=True)
class SeenView:
    """A view of an image and what the model sees of it.

    Attributes:
        view: of the image.
        image: ``(3, h, w)`` network input.
        image_size: (height, width) of the whole image.
    """

    view: View
    image: Tensor
    image_size: tuple[int, int]

    @property
    def is_plain(self) -> bool:
        """Whether this is how the evaluation sees the image."""
        view = self.view
        return view.region == whole(self.image_size) and view.scale == 1 and not view.mirror

    def to_image(self, found: Instances) -> Instances:
        """Detections in pixels of the region -> those of the right size, in pixels of the image."""
        sizes = found.pred_boxes.area().sqrt() * min(self.image.shape[1:]) / min(self.view.size)
        kept = found[(sizes >= self.view.smallest) & (sizes <= self.view.largest)]
        return self.view.to_image(kept, self.image_size)


def see(plan: ViewPlan, pixels: np.ndarray, resize: T.Augmentation, name: str) -> list[SeenView]:
    """All views of an image; see `View.network_input` for the arguments."""
    size = pixels.shape[:2]
    return [
        SeenView(view, view.network_input(pixels, resize, name), size) for view in plan.views(size)
    ]


def detect_views(
    model: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    plan: ViewPlan,
    images: Sequence[Sequence[SeenView]],
    batch_size: int = 1,
    plain: Sequence[Instances] | None = None,
) -> list[Instances]:
    """Detections of each image, on the CPU, in its pixels.

    Args:
        model: in eval mode; as `CoDETR`.
        plan: of the views.
        images: the views of each.
        batch_size: views of equal size that run together; those of different sizes never do.
        plain: what the model finds in each of the images as the evaluation sees it, if that is
            known: it is not computed again.
    """
    found: dict[tuple[int, int], Instances] = {}
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
    for image, views in enumerate(images):
        for number, seen in enumerate(views):
            if plain is not None and seen.is_plain:
                found[image, number] = plain[image].to("cpu")
            else:
                groups[tuple(seen.image.shape)].append((image, number))
    for members in groups.values():
        for start in range(0, len(members), batch_size):
            batch = members[start : start + batch_size]
            inputs = []
            for image, number in batch:
                seen = images[image][number]
                height, width = seen.view.size
                inputs.append({"image": seen.image, "height": height, "width": width})
            for key, output in zip(batch, model(inputs), strict=True):
                found[key] = output["instances"].to("cpu")
    return [
        plan.fuse(
            [seen.view for seen in views],
            [seen.to_image(found[image, number]) for number, seen in enumerate(views)],
        )
        for image, views in enumerate(images)
    ]


class MapperWithViews:
    """A test mapper whose samples also have ``views``, those of a test-time augmentation.

    Args:
        mapper: of the evaluation.
        tta: of the views, see `named_tta`.
    """

    def __init__(self, mapper: CheckedDatasetMapper, tta: Any) -> None:
        self.mapper = mapper
        self.plan = named_tta(tta, "dataloader.tta")

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        sample = self.mapper(record)
        # Read once more, from the file: a resized image would lose what larger views could show.
        pixels = self.mapper.read(dict(record))
        name = f"image {record['file_name']}"
        return sample | {"views": see(self.plan, pixels, self.mapper.augmentations, name)}


def compared_kinds(model: nn.Module, with_tta: bool) -> list[str]:
    """Kinds of detections that an evaluation of `model` reports beside its ``instances``.

    Args:
        with_tta: whether it also looks with test-time augmentation.
    """
    return [*getattr(model, "compared", ()), *([TTA_KIND] if with_tta else [])]


class DetectorWithTTA(nn.Module):
    """A detector that also tells what it finds with test-time augmentation, as ``instances_tta``.

    Args:
        model: in the mode that this module then has, too.
        tta: of the views that samples bring along, see `MapperWithViews`.
    """

    def __init__(self, model: nn.Module, tta: TTA) -> None:
        super().__init__()
        self.model = model
        self.tta = tta
        self.training = model.training

    @property
    def compared(self) -> list[str]:
        return compared_kinds(self.model, with_tta=True)

    def forward(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """See `CoDETR.forward`, in eval mode."""
        outputs = self.model(samples)
        plain = [output["instances"] for output in outputs]
        views = [sample["views"] for sample in samples]
        found = detect_views(self.model, self.tta, views, plain=plain)
        return [
            output | {f"instances_{TTA_KIND}": instances}
            for output, instances in zip(outputs, found, strict=True)
        ]
