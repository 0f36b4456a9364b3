"""What dense heads share: targets and predictions per anchor, and the geometry of cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class DenseTargets:
    """Assignment of all R anchors of B images.

    Attributes:
        labels: ``(B, R)`` in [0, K]; K is background, also for anchors in the padding; -1 for
            anchors that are ignored.
        boxes: ``(B, R, 4)`` absolute xyxy ground truth; zeros where there is none.
        inside: ``(B, R)`` bool, False for anchors whose cell lies in the batch padding.
        truths: ``(B, R)`` index of the ground truth in its image, negative where there is none.
    """

    labels: Tensor
    boxes: Tensor
    inside: Tensor
    truths: Tensor

    @classmethod
    def stack(cls, images: Sequence[DenseTargets]) -> DenseTargets:
        """A batch of images, whose tensors are without B."""
        names = [each.name for each in fields(cls)]
        return cls(*(torch.stack([getattr(one, name) for one in images]) for name in names))

    @property
    def counted(self) -> Tensor:
        """``(B, R)`` bool: anchors that are trained, as foreground or as background."""
        return self.inside & (self.labels >= 0)

    def positive(self, num_classes: int) -> Tensor:
        """``(B, R)`` bool: anchors with a ground truth."""
        return (self.labels >= 0) & (self.labels < num_classes)


@dataclass(frozen=True)
class DensePredictions:
    """Outputs per anchor.

    Attributes:
        logits: ``(B, R, K)`` of the classes.
        deltas: ``(B, R, X)``, boxes in the head's box code.
        quality: ``(B, R)`` logit of how good the box is (centreness, IoU); None where the head
            predicts no such thing.
    """

    logits: Tensor
    deltas: Tensor
    quality: Tensor | None = None

    @property
    def num_classes(self) -> int:
        return self.logits.shape[-1]

    @classmethod
    def of_levels(
        cls, logits: list[Tensor], deltas: list[Tensor], quality: list[Tensor] = ()
    ) -> DensePredictions:
        """Joins rows ``(B, R_l, ...)`` of levels, in float32 at least."""
        dtype = torch.promote_types(logits[0].dtype, torch.float32)
        joined = torch.cat(quality, 1).squeeze(-1).to(dtype) if quality else None
        return cls(torch.cat(logits, 1).to(dtype), torch.cat(deltas, 1).to(dtype), joined)


@dataclass(frozen=True)
class Positives:
    """The P anchors of a batch that have a ground truth.

    Attributes:
        image, index: ``(P,)`` where they are in the ``(B, R)`` of predictions.
        anchors, boxes: ``(P, 4)`` absolute xyxy, the anchors and their ground truths.
        number: how many they are, each image counting at least one.
    """

    image: Tensor
    index: Tensor
    anchors: Tensor
    boxes: Tensor
    number: Tensor

    def pick(self, values: Tensor) -> Tensor:
        """The P rows of ``(B, R, ...)``."""
        return values[self.image, self.index]

    @classmethod
    def of(cls, targets: DenseTargets, anchors: Tensor, num_classes: int) -> Positives:
        """Finds them; ``anchors`` are the ``(R, 4)`` of all levels."""
        mask = targets.positive(num_classes)
        image, index = mask.nonzero(as_tuple=True)
        number = mask.sum(1).clamp(min=1).sum()
        return cls(image, index, anchors[index], targets.boxes[image, index], number)


def centreness_target(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Centreness of anchor centres in their boxes, ``(N, 4), (N, 4)`` xyxy -> ``(N,)`` in (0, 1].

    Source: FCOS equation 3.
    """
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    low, high = centre - boxes[:, :2], boxes[:, 2:] - centre
    ratio = torch.minimum(low, high) / torch.maximum(low, high)
    return (ratio[:, 0] * ratio[:, 1]).sqrt()


def flatten_map(x: Tensor, num_anchors: int = 1) -> Tensor:
    """Map ``(B, A*X, H, W)`` of A anchors per cell -> rows ``(B, H*W*A, X)``."""
    return x.unflatten(1, (num_anchors, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3)


@dataclass(frozen=True)
class InsideCells:
    """The cells of a level that begin inside the un-padded image: a corner of its map.

    Being a corner, they are cut out by slices, whose sizes the host knows. A mask would have to
    tell it how many there are, for which it would wait for the device.

    Attributes:
        height, width: of the map, in cells.
        rows, columns: of the corner, in cells.
        num_anchors: A of every cell.
    """

    height: int
    width: int
    rows: int
    columns: int
    num_anchors: int

    @classmethod
    def of(
        cls, feature: Tensor, stride: int, image_size: tuple[int, int], num_anchors: int = 1
    ) -> InsideCells:
        """Of a map ``(..., H, W)`` of a stride in pixels; ``image_size`` is (height, width)."""
        height, width = feature.shape[-2:]
        rows, columns = (-(-side // stride) for side in image_size)
        return cls(height, width, min(rows, height), min(columns, width), num_anchors)

    def cut(self, values: Tensor) -> Tensor:
        """``(H*W*A, ...)`` values of all anchors -> those of the corner, ``(n, ...)``."""
        grid = values.unflatten(0, (self.height, self.width, self.num_anchors))
        return grid[: self.rows, : self.columns].flatten(0, 2)

    def pad(self, values: Tensor, padding: int) -> Tensor:
        """``(n,)`` values of the corner -> ``(H*W*A,)``, the others with ``padding``."""
        grid = values.view(self.rows, self.columns, self.num_anchors)
        outside = (0, 0, 0, self.width - self.columns, 0, self.height - self.rows)
        return F.pad(grid, outside, value=padding).flatten()

    def mask(self, device: torch.device | None = None) -> Tensor:
        """``(H*W*A,)`` bool, True in the corner."""
        number = self.rows * self.columns * self.num_anchors
        return self.pad(torch.ones(number, dtype=torch.bool, device=device), 0)


def gather_cells(maps: list[Tensor], image: int, indices: Tensor) -> Tensor:
    """Features ``(n, C)`` of cells, indexed over all levels; no level is copied or synced on."""
    gathered, start = None, 0
    for feature in maps:
        cells = feature[image].flatten(1)  # (C, H*W)
        local = (indices - start).clamp(0, cells.shape[1] - 1)
        rows = cells[:, local].transpose(0, 1)
        here = (indices >= start) & (indices < start + cells.shape[1])
        gathered = rows if gathered is None else torch.where(here[:, None], rows, gathered)
        start += cells.shape[1]
    return gathered
