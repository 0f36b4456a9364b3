"""ATSS as an auxiliary head: one square anchor per location, dense one-to-many assignment."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, batched_nms
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from co_detr.errors import ConfigError
from co_detr.modeling.auxiliary.assigners import ATSSAssigner
from co_detr.modeling.auxiliary.dense import (
    DensePredictions,
    DenseTargets,
    centreness_target,
    decode_deltas,
    flatten_map,
    gather_cells,
    inside_cells,
)
from co_detr.modeling.boxes import generalised_iou
from co_detr.modeling.criterion import EPS, FocalLoss, average_over_processes
from co_detr.structures import AuxiliaryOutput, Candidates


class ATSSHead(nn.Module):
    """Dense head with focal, centreness-weighted GIoU and centreness losses.

    Source: ATSS (CVPR 2020); mmdet ``ATSSHead`` as configured by Co-DETR: one convolution with
    GroupNorm per tower, one anchor of side 8 x stride.

    Args:
        in_features: names of the maps, finest first; strides: their strides in pixels.
        anchor_scale: side of the anchor in strides.
        test_topk, test_nms, max_detections: used by ``inference`` only.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int,
        in_features: Sequence[str] = ("p3", "p4", "p5", "p6", "p7"),
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        assigner: ATSSAssigner,
        anchor_scale: float = 8.0,
        num_convs: int = 1,
        num_groups: int = 32,
        giou_weight: float = 2.0,
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
        self.assigner = assigner
        self.giou_weight = giou_weight
        self.test_topk = test_topk
        self.test_nms = test_nms
        self.max_detections = max_detections
        self.classification = FocalLoss()
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[anchor_scale * stride] for stride in strides],
            aspect_ratios=[1.0],
            strides=self.strides,
            offset=0.0,
        )
        self.box2box_transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
        self.class_tower = _tower(embed_dim, num_convs, num_groups)
        self.box_tower = _tower(embed_dim, num_convs, num_groups)
        self.class_logits = nn.Conv2d(embed_dim, num_classes, 3, padding=1)
        self.box_deltas = nn.Conv2d(embed_dim, 4, 3, padding=1)
        self.centreness = nn.Conv2d(embed_dim, 1, 3, padding=1)
        self.scales = nn.ParameterList([torch.ones(()) for _ in self.strides])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.class_logits.bias, -math.log((1 - 0.01) / 0.01))

    def forward(
        self, images: ImageList, features: dict[str, Tensor], gt_instances: list[Instances]
    ) -> AuxiliaryOutput:
        """Trains the head; every anchor is a candidate for positive queries."""
        maps = [features[name] for name in self.in_features]
        anchors = self.anchors(maps)
        targets = self.assign(anchors, maps, images.image_sizes, gt_instances)
        losses = self.losses(self.predict(maps), torch.cat(anchors), targets)
        return AuxiliaryOutput(losses, self._candidates(anchors, maps, targets, images))

    def predict(self, maps: list[Tensor]) -> DensePredictions:
        """Maps ``(B, C, H, W)`` -> predictions of all anchors, finest level first."""
        logits, deltas, centreness = [], [], []
        for features, scale in zip(maps, self.scales, strict=True):
            box_features = self.box_tower(features)
            logits.append(flatten_map(self.class_logits(self.class_tower(features))))
            deltas.append(flatten_map(self.box_deltas(box_features) * scale))
            centreness.append(flatten_map(self.centreness(box_features)))
        dtype = torch.promote_types(maps[0].dtype, torch.float32)
        return DensePredictions(
            torch.cat(logits, 1).to(dtype),
            torch.cat(deltas, 1).to(dtype),
            torch.cat(centreness, 1).squeeze(-1).to(dtype),
        )

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
        labels, boxes, insides = [], [], []
        for size, instances in zip(image_sizes, gt_instances, strict=True):
            inside_levels = [
                inside_cells(m, stride, size) for m, stride in zip(maps, self.strides, strict=True)
            ]
            inside = torch.cat(inside_levels)
            gt_boxes = instances.gt_boxes.tensor
            found = self.assigner(
                [level[keep] for level, keep in zip(anchors, inside_levels, strict=True)], gt_boxes
            )
            assigned = found.new_full((len(inside),), -1)
            assigned[inside] = found
            foreground = assigned >= 0
            # One more row, so that an image without ground truth has something to index.
            gt_classes = F.pad(instances.gt_classes, (0, 1), value=self.num_classes)
            padded_boxes = F.pad(gt_boxes, (0, 0, 0, 1))
            row = torch.where(foreground, assigned, len(gt_boxes))
            labels.append(gt_classes[row])
            boxes.append(padded_boxes[row])
            insides.append(inside)
        return DenseTargets(torch.stack(labels), torch.stack(boxes), torch.stack(insides))

    def losses(
        self, predictions: DensePredictions, anchors: Tensor, targets: DenseTargets
    ) -> dict[str, Tensor]:
        """Un-weighted ``loss_cls``, ``loss_bbox`` and ``loss_centreness``.

        The classification and centreness losses are divided by the number of positives (each
        image counts at least one), the box loss by the sum of centreness; both are averaged over
        processes.
        """
        positive = targets.labels < self.num_classes
        image, index = positive.nonzero(as_tuple=True)
        matched_anchors, matched_boxes = anchors[index], targets.boxes[positive]
        centreness = centreness_target(matched_anchors, matched_boxes)
        centreness = centreness.to(predictions.centreness.dtype)
        counts = torch.stack(
            [positive.sum(1).clamp(min=1).sum().to(centreness.dtype), centreness.sum()]
        )
        num_positives, centreness_sum = average_over_processes(counts)
        class_terms = self.classification(predictions.logits, targets.labels) * targets.inside
        overlap = generalised_iou(
            decode_deltas(
                self.box2box_transform, predictions.deltas[image, index], matched_anchors
            ),
            matched_boxes,
        )
        centreness_loss = F.binary_cross_entropy_with_logits(
            predictions.centreness[positive], centreness, reduction="sum"
        )
        return {
            "loss_cls": class_terms.sum() / (num_positives + EPS),
            "loss_bbox": self.giou_weight
            * ((1 - overlap) * centreness).sum()
            / centreness_sum.clamp(min=1),
            "loss_centreness": centreness_loss / (num_positives + EPS),
        }

    def _candidates(
        self, anchors: list[Tensor], maps: list[Tensor], targets: DenseTargets, images: ImageList
    ) -> Candidates:
        flat = torch.cat(anchors)
        instances = []
        for image, size in enumerate(images.image_sizes):
            # As in the reference, anchors in the padding stay in the pool of background
            # candidates, as empty boxes at the origin.
            boxes = flat * targets.inside[image, :, None]
            instances.append(
                Instances(
                    size,
                    proposal_boxes=Boxes(boxes),
                    gt_classes=targets.labels[image],
                    gt_boxes=Boxes(targets.boxes[image]),
                )
            )
        return Candidates(instances, lambda image, indices: gather_cells(maps, image, indices))

    def inference(self, images: ImageList, features: dict[str, Tensor]) -> list[Instances]:
        """Detections with absolute ``pred_boxes``, ``scores`` and ``pred_classes``.

        Each level keeps its ``test_topk`` best (anchor, class) pairs by class score; the final
        score is the class score times the centreness.
        """
        maps = [features[name] for name in self.in_features]
        levels = [len(level) for level in self.anchors(maps)]
        anchors = torch.cat(self.anchors(maps))
        predictions = self.predict(maps)
        detections = []
        for image, size in enumerate(images.image_sizes):
            scores = predictions.logits[image].sigmoid()
            kept, start = [], 0
            for count in levels:
                flat = scores[start : start + count].flatten()
                best = flat.topk(min(self.test_topk, flat.numel())).indices
                kept.append(best + start * self.num_classes)
                start += count
            pairs = torch.cat(kept)
            index, classes = pairs // self.num_classes, pairs % self.num_classes
            decoded = decode_deltas(
                self.box2box_transform, predictions.deltas[image, index], anchors[index]
            )
            boxes = Boxes(decoded)
            boxes.clip(size)
            final = scores[index, classes] * predictions.centreness[image, index].sigmoid()
            keep = batched_nms(boxes.tensor, final, classes, self.test_nms)[: self.max_detections]
            detections.append(
                Instances(
                    size, pred_boxes=boxes[keep], scores=final[keep], pred_classes=classes[keep]
                )
            )
        return detections


def _tower(channels: int, num_convs: int, num_groups: int) -> nn.Sequential:
    return nn.Sequential(
        *[
            Conv2d(
                channels,
                channels,
                3,
                padding=1,
                bias=False,
                norm=nn.GroupNorm(num_groups, channels),
                activation=F.relu,
            )
            for _ in range(num_convs)
        ]
    )
