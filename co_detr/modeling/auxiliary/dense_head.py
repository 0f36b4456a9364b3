"""The dense head: anchors, assignment, candidates and detections, whatever network and losses."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from detectron2.layers import batched_nms
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, ImageList, Instances
from omegaconf import DictConfig
from torch import Tensor, nn

from co_detr.errors import ConfigError
from co_detr.modeling.auxiliary.assigners import BACKGROUND, IGNORED
from co_detr.modeling.auxiliary.dense_losses import (
    BoxCode,
    DensePredictions,
    DenseTargets,
    Positives,
)
from co_detr.structures import (
    AuxiliaryOutput,
    Candidates,
    HeadCounts,
    HeadDetections,
    loss_weights,
)


class DenseHead(nn.Module):
    """One-to-many head on all cells of a pyramid; subclasses bring the network (``predict``).

    What else a subclass says of itself: ``class_layers`` (see `ClassRows`), and, if it has settings
    that small images need otherwise, `make_small`.

    Args:
        in_features: names of the maps, finest first; strides: their strides in pixels.
        anchor_generator: gives every cell the same number A of anchors.
        assigner: see `co_detr.modeling.auxiliary.assigners`.
        box_code, criterion: see `co_detr.modeling.auxiliary.dense_losses`.
        test_topk, test_nms, max_detections: used by ``detect`` only.

    Attributes:
        pads_candidates: whether anchors in the padding are background candidates, as empty boxes at
            the origin; else they are no candidates at all.
    """

    pads_candidates = False

    def __init__(
        self,
        *,
        num_classes: int,
        in_features: Sequence[str],
        strides: Sequence[int],
        anchor_generator: DefaultAnchorGenerator,
        assigner: nn.Module,
        box_code: BoxCode,
        criterion: nn.Module,
        test_topk: int = 1000,
        test_nms: float = 0.6,
        max_detections: int = 100,
    ):
        super().__init__()
        if len(in_features) != len(strides):
            raise ConfigError(f"{len(in_features)} in_features but {len(strides)} strides.")
        self.num_classes = num_classes
        self.in_features = list(in_features)
        self.strides = list(strides)
        self.anchor_generator = anchor_generator
        self.num_anchors = anchor_generator.num_anchors[0]
        self.assigner = assigner
        self.box_code = box_code
        self.criterion = criterion
        self.test_topk = test_topk
        self.test_nms = test_nms
        self.max_detections = max_detections

    @classmethod
    def make_small(cls, node: DictConfig, num_groups: int) -> None:
        """Changes a config of the head, in place, for small images: anchors of half their size.

        A head that has neither ``anchor_scale`` nor ``num_groups`` stays as it is.

        Args:
            node: of a head of this class.
            num_groups: of group norms, which layers of fewer channels need.
        """
        takes = inspect.signature(cls).parameters
        if "anchor_scale" in takes:
            node.anchor_scale = node.get("anchor_scale", takes["anchor_scale"].default) / 2
        if "num_groups" in takes:
            node.num_groups = num_groups

    def predict(self, maps: list[Tensor]) -> DensePredictions:
        """Maps ``(B, C, H, W)`` -> predictions of all anchors, finest level first, in float32."""
        raise NotImplementedError

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances],
        totals: HeadCounts | None = None,
    ) -> AuxiliaryOutput:
        """Trains the head; every anchor is a candidate for positive queries.

        Args:
            totals: what `count` gives for the images of all micro-batches, to whose losses those
                of this one are then a contribution; None: this batch is all there is.
        """
        maps = [features[name] for name in self.in_features]
        anchors = self.anchors(maps)
        predictions, targets = self._predict_and_assign(images, maps, anchors, gt_instances)
        weights = None
        if any(instances.has("gt_weights") for instances in gt_instances):
            weights = self._weights(targets, gt_instances)
            predictions = predictions.with_scaled_gradients(weights)
        normalizers = None if totals is None else totals.normalizers
        losses = self.losses(predictions, torch.cat(anchors), targets, normalizers)
        return AuxiliaryOutput(losses, self._candidates(anchors, maps, targets, images, weights))

    def _weights(self, targets: DenseTargets, gt_instances: list[Instances]) -> Tensor:
        """``(B, R)`` those of the assigned ground truths; 1 where there is none."""
        of_images = []
        for truths, instances in zip(targets.truths, gt_instances, strict=True):
            weights = F.pad(loss_weights(instances), (0, 1), value=1.0)
            of_images.append(weights[torch.where(truths >= 0, truths, len(instances))])
        return torch.stack(of_images)

    @torch.no_grad()
    def count(
        self, images: ImageList, features: dict[str, Tensor] | None, gt_instances: list[Instances]
    ) -> HeadCounts:
        """What `forward` divides the losses of this batch by, as its criterion counts it.

        Args:
            features: None will do with `counts_without_features`.
        """
        if self.counts_without_features:
            maps = self._no_maps(images)
            anchors, predictions = self.anchors(maps), None
            targets = self.assign(anchors, maps, images.image_sizes, gt_instances)
        else:
            maps = [features[name] for name in self.in_features]
            anchors = self.anchors(maps)
            predictions, targets = self._predict_and_assign(images, maps, anchors, gt_instances)
        found = Positives.of(targets, torch.cat(anchors), self.num_classes)
        return HeadCounts(
            self.criterion.counts(found, predictions, self.box_code),
            targets.positive(self.num_classes).sum(1).tolist(),
        )

    @property
    def counts_without_features(self) -> bool:
        """Whether anchors and ground truths decide what is assigned, and what that counts."""
        return not self.criterion.counts_predictions

    def _no_maps(self, images: ImageList) -> list[Tensor]:
        """Without memory; of all that maps have, anchors and the assignment need their sizes.

        Real ones may be larger: what lies in the padding is not assigned.
        """
        height, width = (max(sides) for sides in zip(*images.image_sizes, strict=True))
        nothing = images.tensor.new_zeros(())
        return [
            nothing.expand(len(images), 1, -(-height // stride), -(-width // stride))
            for stride in self.strides
        ]

    def _predict_and_assign(
        self,
        images: ImageList,
        maps: list[Tensor],
        anchors: list[Tensor],
        gt_instances: list[Instances],
    ) -> tuple[DensePredictions, DenseTargets]:
        predictions = self.predict(maps)
        targets = self.assign(anchors, maps, images.image_sizes, gt_instances)
        return predictions, self.refine(targets, predictions, anchors)

    def anchors(self, maps: list[Tensor]) -> list[Tensor]:
        """``(R_l, 4)`` absolute xyxy per level."""
        return [boxes.tensor for boxes in self.anchor_generator(maps)]

    @torch.no_grad()
    def assign(
        self,
        anchors: list[Tensor],
        maps: list[Tensor],
        image_sizes: list[tuple[int, int]],
        gt_instances: list[Instances],
    ) -> DenseTargets:
        """Assigns all images; anchors whose cell lies in the padding never get a ground truth."""
        corners = [
            [
                InsideCells.of(level, stride, size, self.num_anchors)
                for level, stride in zip(maps, self.strides, strict=True)
            ]
            for size in image_sizes
        ]
        kept = [
            [corner.cut(level) for corner, level in zip(image, anchors, strict=True)]
            for image in corners
        ]
        found = [
            self.assigner(levels, instances.gt_boxes.tensor)
            for levels, instances in zip(kept, gt_instances, strict=True)
        ]
        images = [
            self._image_targets(*image) for image in zip(corners, found, gt_instances, strict=True)
        ]
        names = [field.name for field in fields(DenseTargets)]
        return DenseTargets(
            **{name: torch.stack([getattr(image, name) for image in images]) for name in names}
        )

    def _image_targets(
        self, corners: list[InsideCells], found: Tensor, instances: Instances
    ) -> DenseTargets:
        """Of one image, its tensors without B.

        Args:
            found: what the assigner says about the anchors of all corners.
        """
        levels = found.split([corner.number for corner in corners])
        assigned = torch.cat(
            [corner.pad(level, BACKGROUND) for corner, level in zip(corners, levels, strict=True)]
        )
        inside = torch.cat([corner.mask(assigned.device) for corner in corners])
        # One more row, so that an image without ground truth has something to index.
        gt_classes = F.pad(instances.gt_classes, (0, 1), value=self.num_classes)
        gt_boxes = F.pad(instances.gt_boxes.tensor, (0, 0, 0, 1))
        row = torch.where(assigned >= 0, assigned, len(instances))
        labels = torch.where(assigned == IGNORED, -1, gt_classes[row])
        return DenseTargets(labels=labels, boxes=gt_boxes[row], inside=inside, truths=assigned)

    def refine(
        self, targets: DenseTargets, predictions: DensePredictions, anchors: list[Tensor]
    ) -> DenseTargets:
        """For heads whose assignment depends on what they predict."""
        return targets

    def losses(
        self,
        predictions: DensePredictions,
        anchors: Tensor,
        targets: DenseTargets,
        totals: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses by name, weighted; ``anchors`` are the ``(R, 4)`` of all levels.

        Args:
            totals: the criterion's counts of all micro-batches of the step.
        """
        return self.criterion(predictions, anchors, targets, self.box_code, totals)

    def _candidates(
        self,
        anchors: list[Tensor],
        maps: list[Tensor],
        targets: DenseTargets,
        images: ImageList,
        weights: Tensor | None,
    ) -> Candidates:
        flat, labels = torch.cat(anchors), targets.labels
        if not self.pads_candidates:
            labels = torch.where(targets.inside, labels, -1)
        instances = [
            Instances(
                size,
                proposal_boxes=Boxes(flat * targets.inside[image, :, None]),
                gt_classes=labels[image],
                gt_boxes=Boxes(targets.boxes[image]),
            )
            for image, size in enumerate(images.image_sizes)
        ]
        if weights is not None:
            for image, own in zip(instances, weights, strict=True):
                image.gt_weights = own

        def gather_features(image: int, indices: Tensor) -> Tensor:
            return gather_cells(maps, image, indices // self.num_anchors)

        return Candidates(instances, gather_features)

    def rescore(self, scores: Tensor, quality: Tensor) -> Tensor:
        """Final scores from class scores and predicted quality, ``(n,)`` each, both in [0, 1]."""
        return scores * quality

    def detect(self, images: ImageList, features: dict[str, Tensor]) -> HeadDetections:
        """Detects on its own; needs ``eval()``.

        Each level keeps its ``test_topk`` best (anchor, class) pairs by class score; the final
        score takes the predicted quality of the box into account. A candidate is, as in training,
        the anchor or point that the detection was predicted from, with the feature of its cell.
        """
        maps = [features[name] for name in self.in_features]
        levels = self.anchors(maps)
        anchors, predictions = torch.cat(levels), self.predict(maps)
        detections, origins = [], []
        for image, size in enumerate(images.image_sizes):
            scores = predictions.logits[image].sigmoid()
            pairs = self._best_pairs(scores, [len(level) for level in levels])
            index, classes = pairs // self.num_classes, pairs % self.num_classes
            boxes = Boxes(self.box_code.decode(predictions.deltas[image, index], anchors[index]))
            boxes.clip(size)
            final = scores[index, classes]
            if predictions.quality is not None:
                final = self.rescore(final, predictions.quality[image, index].sigmoid())
            keep = batched_nms(boxes.tensor, final, classes, self.test_nms)[: self.max_detections]
            detections.append(
                Instances(
                    size, pred_boxes=boxes[keep], scores=final[keep], pred_classes=classes[keep]
                )
            )
            origins.append(index[keep])

        def gather_features(image: int, indices: Tensor) -> Tensor:
            return gather_cells(maps, image, origins[image][indices] // self.num_anchors)

        starts = [Boxes(anchors[index]) for index in origins]
        return HeadDetections(
            detections, Candidates.of_detections(detections, starts, gather_features)
        )

    def _best_pairs(self, scores: Tensor, counts: list[int]) -> Tensor:
        """Indices into the flattened ``(R, K)``, the best ``test_topk`` of every level."""
        kept, start = [], 0
        for level in scores.split(counts):
            best = level.flatten().topk(min(self.test_topk, level.numel())).indices
            kept.append(best + start * self.num_classes)
            start += len(level)
        return torch.cat(kept)


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

    @property
    def number(self) -> int:
        """Of the anchors in the corner."""
        return self.rows * self.columns * self.num_anchors

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
        return self.pad(torch.ones(self.number, dtype=torch.bool, device=device), 0)


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
