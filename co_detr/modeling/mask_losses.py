"""How the mask head is trained: which boxes, on which targets, with which losses.

``mask_head`` in `co_detr.modeling.masks` is the network. Sizes S of masks are 14, 28, 56 and 112.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor, nn
from torchvision.ops import roi_align

from co_detr.modeling.geometry import Geometry
from co_detr.modeling.losses import iou
from co_detr.modeling.postprocess import choose_pairs
from co_detr.structures import Predictions, bitmaps_of, to_device

# Pixels of ground truths that are looked at as float numbers at a time.
MAX_PIXELS = 1 << 24


@dataclass(frozen=True)
class SampledBoxes:
    """The boxes of one image that the head is trained on, in order of their candidates.

    Attributes:
        boxes: ``(N, 4)`` absolute xyxy, without a gradient.
        truths: ``(N,)`` int64 index of the ground truth of each, on the host.
        levels: ``(N,)`` int64, on the host, see ``RefineMaskHead.levels``.
    """

    boxes: Tensor
    truths: Tensor
    levels: Tensor


class RegionSampler(nn.Module):
    """Chooses boxes that overlap an object: ground truths, and what the decoder predicts.

    1. Proposals are the best (query, class) pairs of an image, whatever they overlap; a box comes
       as often as it has classes among them. Denoising queries are queries as well here: early in
       training most boxes that fit are theirs.
    2. Candidates are the ground truths, then the proposals. One with an IoU of at least
       ``iou_threshold`` belongs to the object that it overlaps most; its own class is ignored.
    3. Of these, at most ``max_positives`` are drawn. Others teach no mask.

    Source: mmdet ``MaxIoUAssigner`` and ``RandomSampler`` (512, of which a quarter positive).
    """

    def __init__(self, *, num_proposals: int, max_positives: int = 128, iou_threshold: float = 0.5):
        super().__init__()
        self.num_proposals = num_proposals
        self.max_positives = max_positives
        self.iou_threshold = iou_threshold
        self.permutation: Callable[[int], Tensor] = torch.randperm  # replaceable: recorded draws

    @torch.no_grad()
    def forward(
        self,
        predictions: Predictions,
        truths: Sequence[Instances],
        geometry: Geometry,
        levels: Callable[[Tensor], Tensor],
    ) -> list[SampledBoxes]:
        """Samples of each image; the host waits for the device once.

        Args:
            predictions: of one layer, D = 1.
            truths: with ``gt_boxes``; empty where nothing is to be learned.
            levels: ``(N, 4)`` boxes -> ``(N,)`` levels.
        """
        boxes, scores = self.propose(predictions, geometry)
        candidates = [
            torch.cat([truth.gt_boxes.tensor.to(own.dtype), own])
            for truth, own in zip(truths, boxes, strict=True)
        ]
        assigned = [
            self.assign(truth.gt_boxes.tensor, own, score > 0)
            for truth, own, score in zip(truths, boxes, scores, strict=True)
        ]
        numbers = [len(instances) for instances in candidates]
        found = torch.stack([torch.cat(assigned), levels(torch.cat(candidates))]).cpu()
        samples = []
        for own, (truth, level) in zip(
            candidates, (regions.unbind() for regions in found.split(numbers, dim=1)), strict=True
        ):
            rows = self.draw((truth >= 0).nonzero().squeeze(1))
            samples.append(SampledBoxes(own[to_device(rows, own.device)], truth[rows], level[rows]))
        return samples

    def propose(self, predictions: Predictions, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Boxes ``(B, N, 4)``, absolute and clipped to the images, and scores ``(B, N)``."""
        pairs = choose_pairs(predictions.logits[-1], predictions.boxes[-1], self.num_proposals)
        return pairs.absolute(geometry), pairs.scores

    def assign(self, gt_boxes: Tensor, proposals: Tensor, usable: Tensor) -> Tensor:
        """Index of the ground truth of each candidate, -1 for none: ``(G + N,)`` int64.

        Args:
            gt_boxes: ``(G, 4)``; proposals: ``(N, 4)``; usable: ``(N,)`` bool.
        """
        own = torch.arange(len(gt_boxes), device=proposals.device)
        if not len(gt_boxes):
            return torch.full_like(proposals[:, 0], -1, dtype=torch.long)
        overlaps, truths = iou(gt_boxes[:, None].to(proposals.dtype), proposals[None]).max(0)
        positive = (overlaps >= self.iou_threshold) & usable
        return torch.cat([own, torch.where(positive, truths, -1)])

    def draw(self, positives: Tensor) -> Tensor:
        """At most `max_positives` of them, in ascending order; on the host."""
        if len(positives) <= self.max_positives:
            return positives
        chosen = self.permutation(len(positives))[: self.max_positives]
        return positives[chosen].sort().values


@dataclass(frozen=True)
class MaskTargets:
    """What the masks of N regions should be.

    Attributes:
        masks: ``(N, S, S)`` bool of each size.
        shares: ``(N,)`` share of the whole mask of the object that lies inside the box.
    """

    masks: list[Tensor]
    shares: Tensor

    @classmethod
    def cat(cls, parts: Sequence[MaskTargets]) -> MaskTargets:
        sizes = zip(*(part.masks for part in parts), strict=True)
        shares = torch.cat([part.shares for part in parts])
        return cls([torch.cat(masks) for masks in sizes], shares)


@torch.no_grad()
def mask_targets(
    samples: Sequence[SampledBoxes],
    gt_masks: Sequence[PolygonMasks | BitMasks | None],
    image_sizes: Sequence[tuple[int, int]],
    sizes: Sequence[int],
) -> MaskTargets:
    """Targets of the boxes of all images, one image after the other.

    RoIAlign brings what lies in a box to each of the ``sizes``; it is foreground from 0.5 on.
    Objects are bitmaps of the network input: polygons would give other pixels at the border.
    Source: mmdet ``mask_target`` and ``BitmapMasks.crop_and_resize``.

    Args:
        gt_masks: per image, on any device; None where there are no samples.
        image_sizes: (height, width) of the network input.
    """
    parts = []
    for sample, masks, (height, width) in zip(samples, gt_masks, image_sizes, strict=True):
        device, rows = sample.boxes.device, []
        step = max(1, MAX_PIXELS // (height * width))
        chunks = 0 if masks is None else len(masks)
        for start in range(0, chunks, step):
            here = (sample.truths >= start) & (sample.truths < start + step)
            rows.append(here.nonzero().squeeze(1))
            index, truths = (to_device(x, device) for x in (rows[-1], sample.truths[here] - start))
            bitmaps = bitmaps_of(masks[start : start + step], (height, width))
            # The network input may count padding in.
            missing = (0, width - bitmaps.shape[2], 0, height - bitmaps.shape[1])
            bitmaps = F.pad(to_device(bitmaps, device), missing)
            parts.append(targets_of(bitmaps, sample.boxes[index], truths, sizes))
        if len(rows) > 1:  # back to the order of the samples
            order = to_device(torch.cat(rows).argsort(), device)
            whole = MaskTargets.cat(parts[-len(rows) :])
            parts[-len(rows) :] = [
                MaskTargets([mask[order] for mask in whole.masks], whole.shares[order])
            ]
    if not parts:
        none = samples[0].boxes[:0]
        empty = [none.new_zeros(0, side, side, dtype=torch.bool) for side in sizes]
        return MaskTargets(empty, none.new_zeros(0))
    return MaskTargets.cat(parts)


def targets_of(bitmaps: Tensor, boxes: Tensor, truths: Tensor, sizes: Sequence[int]) -> MaskTargets:
    """Targets of boxes ``(N, 4)`` that each belong to one of the bitmaps ``(G, H, W)``.

    Args:
        truths: ``(N,)`` int64 index of the bitmap.
    """
    height, width = bitmaps.shape[1:]
    clipped = torch.stack(
        [side.clamp(0, width if axis % 2 == 0 else height) for axis, side in enumerate(boxes.T)], 1
    )
    rois = torch.cat([truths[:, None].to(boxes.dtype), clipped], dim=1)
    values = bitmaps[:, None].to(boxes.dtype)
    masks = [roi_align(values, rois, side, aligned=True)[:, 0] >= 0.5 for side in sizes]
    return MaskTargets(masks, share_inside(bitmaps, boxes, truths))


def share_inside(bitmaps: Tensor, boxes: Tensor, truths: Tensor) -> Tensor:
    """Share of each box's object that is inside the box, ``(N,)``; see `targets_of`.

    As in the reference, corners are cut to whole pixels, and a box has at least one.
    """
    height, width = bitmaps.shape[1:]
    x0, y0, x1, y1 = boxes.long().unbind(1)
    x0, x1 = (x.clamp(0, width) for x in (x0, x1))
    y0, y1 = (y.clamp(0, height) for y in (y0, y1))
    x1 = torch.maximum(x1, x0 + 1).clamp(max=width)
    y1 = torch.maximum(y1, y0 + 1).clamp(max=height)
    # Foreground above and left of each corner of a pixel.
    below = F.pad(bitmaps.cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32), (1, 0, 1, 0))
    inside = below[truths, y1, x1] - below[truths, y0, x1] - below[truths, y1, x0]
    inside = inside + below[truths, y0, x0]
    return (inside.double() / (below[truths, -1, -1] + 1e-7)).to(boxes.dtype)


def mask_iou_target(logits: Tensor, targets: MaskTargets) -> Tensor:
    """IoU of predicted masks with those of the whole objects, ``(N,)``; NaN for 0 / 0.

    What of an object lies outside the box is known by its share only.

    Args:
        logits: ``(N, 28, 28)``.
    """
    predicted, target = logits.detach().sigmoid() > 0.5, targets.masks[1]
    overlap, found, area = (
        region.sum((1, 2)).to(targets.shares.dtype)
        for region in (predicted & target, predicted, target)
    )
    return overlap / (found + area / (targets.shares + 1e-7) - overlap)


class MaskCriterion(nn.Module):
    """Cross entropy of the masks of all stages; of the last two only along boundaries.

    The first two are means over all pixels of all regions. The others are means over those pixels
    (at least 1) that are near the boundary of the mask before them, as it is predicted or as it
    should be. Before the last one that is, as at test time, the third mask where it counts and the
    second one elsewhere.
    Source: RefineMask section 3.4; ``BARCrossEntropyLoss`` of the reference.

    Args:
        loss_weight: of the sum of all stages.
        stage_weights: of each stage.
        boundary_width: pixels on either side of a boundary, in the mask before.
    """

    def __init__(
        self,
        *,
        loss_weight: float = 1.33,
        stage_weights: Sequence[float] = (0.5, 0.75, 0.75, 1.0),
        boundary_width: int = 2,
    ):
        super().__init__()
        self.loss_weight = loss_weight
        self.stage_weights = list(stage_weights)
        self.boundary_width = boundary_width

    def forward(self, logits: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Logits and bool targets ``(N, S, S)`` of each stage -> the loss.

        Without any region it is 0, with gradients that are 0.
        """
        return self.loss_weight * sum(
            weight * loss
            for weight, loss in zip(self.stage_weights, self.stages(logits, targets), strict=True)
        )

    def stages(self, logits: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
        """The loss of each stage, without its weight."""
        regions = self.regions(logits, targets)
        return [
            _mean_entropy(predicted, target, region)
            for predicted, target, region in zip(logits, targets, regions, strict=True)
        ]

    @torch.no_grad()
    def regions(self, logits: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor | None]:
        """Where the loss of each stage is computed, ``(N, S, S)`` bool; None: everywhere."""
        width = self.boundary_width
        near = [
            covers(boundary(predicted, width) | boundary(target, width))
            for predicted, target in zip(self.previous(logits), targets[1:3], strict=True)
        ]
        return [None, None, *near]

    @torch.no_grad()
    def previous(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """The mask before each of the last two: ``(N, 28, 28)`` and ``(N, 56, 56)`` bool."""
        coarse = logits[1] >= 0
        stays = enlarge(logits[1][:, None]).squeeze(1)
        return [coarse, torch.where(covers(boundary(coarse, 1)), logits[2], stays) >= 0]


def _mean_entropy(logits: Tensor, target: Tensor, region: Tensor | None) -> Tensor:
    entropy = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
    if region is None:
        return entropy.sum() / max(1, entropy.numel())
    return (entropy * region).sum() / region.sum().clamp(min=1)


def boundary(masks: Tensor, width: int) -> Tensor:
    """Pixels near the boundary of ``(N, S, S)`` bool masks: at most ``width`` away from it.

    More than a tenth of the window around such a pixel is of the other kind. What is outside the
    region counts as background, so that a full mask has a boundary and an empty one has none.
    """
    values = masks.float()
    mean = F.avg_pool2d(values[:, None], 2 * width + 1, stride=1, padding=width).squeeze(1)
    return (values - mean).abs() > 0.1


def enlarge(maps: Tensor) -> Tensor:
    """``(N, 1, S, S)`` to twice the size; the outermost values stay at the corners."""
    return F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=True)


def covers(where: Tensor) -> Tensor:
    """``(N, S, S)`` bool at twice the size."""
    return enlarge(where[:, None].float()).squeeze(1) >= 0.5


def refine(logits: Sequence[Tensor]) -> Tensor:
    """The final mask's logits ``(N, 112, 112)`` from those of all stages.

    A finer mask counts near the boundary of the one before; elsewhere that one stays.
    """
    refined = logits[1]
    for finer in logits[2:]:
        stays = covers(~boundary(refined >= 0, 1))
        refined = torch.where(stays, enlarge(refined[:, None]).squeeze(1), finer)
    return refined


def values_at(values: Tensor, labels: Tensor) -> Tensor:
    """``(N, K)`` -> ``(N,)``, the value of each row's label."""
    return values.gather(1, labels[:, None]).squeeze(1)
