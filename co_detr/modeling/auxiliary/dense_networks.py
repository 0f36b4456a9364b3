"""The networks of the dense heads, and with their parts the heads themselves: ATSS, PAA, GFL
(all on towers of convolutions), RetinaNet and FCOS (Detectron2's networks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.fcos import FCOSHead as FCOSNetwork
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead as RetinaNetNetwork
from omegaconf import DictConfig
from torch import Tensor, nn

from co_detr.modeling.auxiliary.assigners import BACKGROUND, ATSSAssigner
from co_detr.modeling.auxiliary.dense_head import DenseHead
from co_detr.modeling.auxiliary.dense_losses import (
    BoxCode,
    CenternessCriterion,
    DeltaCode,
    DensePredictions,
    DenseTargets,
    DistanceCode,
)
from co_detr.structures import ClassRows


class TowerHead(DenseHead):
    """The network of ATSS, PAA and GFL: towers with GroupNorm, a scale per level for the boxes.

    Args:
        assigner, box_code, criterion: what makes it one head or the other; see `DenseHead`.
        anchor_scale: side of the anchor in strides; its center is the corner of the cell.
        num_convs: convolutions per tower; Co-DETR has one, the papers of the heads four.
    """

    class_layers = {"class_logits": ClassRows()}

    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int,
        in_features: Sequence[str] = ("p3", "p4", "p5", "p6", "p7"),
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        assigner: nn.Module,
        box_code: BoxCode,
        criterion: nn.Module,
        anchor_scale: float = 8.0,
        num_convs: int = 1,
        num_groups: int = 32,
        test_topk: int = 1000,
        test_nms: float = 0.6,
        max_detections: int = 100,
    ):
        super().__init__(
            num_classes=num_classes,
            in_features=in_features,
            strides=strides,
            anchor_generator=DefaultAnchorGenerator(
                sizes=[[anchor_scale * stride] for stride in strides],
                aspect_ratios=[1.0],
                strides=list(strides),
                offset=0.0,
            ),
            assigner=assigner,
            box_code=box_code,
            criterion=criterion,
            test_topk=test_topk,
            test_nms=test_nms,
            max_detections=max_detections,
        )
        self.class_tower = _tower(embed_dim, num_convs, num_groups)
        self.box_tower = _tower(embed_dim, num_convs, num_groups)
        self.class_logits = nn.Conv2d(embed_dim, num_classes, 3, padding=1)
        self.box_deltas = nn.Conv2d(embed_dim, box_code.num_outputs, 3, padding=1)
        # Named for ATSS, whose checkpoints exist; the criterion says which quality it predicts.
        self.centerness = nn.Conv2d(embed_dim, 1, 3, padding=1) if criterion.has_quality else None
        self.scales = nn.ParameterList([torch.ones(()) for _ in self.strides])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.class_logits.bias, -math.log((1 - 0.01) / 0.01))

    def predict(self, maps: list[Tensor]) -> DensePredictions:
        logits, deltas, quality = [], [], []
        for features, scale in zip(maps, self.scales, strict=True):
            box_features = self.box_tower(features)
            logits.append(flatten_map(self.class_logits(self.class_tower(features))))
            deltas.append(flatten_map(self.box_deltas(box_features) * scale))
            if self.centerness is not None:
                quality.append(flatten_map(self.centerness(box_features)))
        return DensePredictions.of_levels(logits, deltas, quality)


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


class ATSSHead(TowerHead):
    """Dense head with focal, centerness-weighted GIoU and centerness losses.

    Source: ATSS (CVPR 2020); mmdet ``ATSSHead`` as configured by Co-DETR: one convolution with
    GroupNorm per tower, one anchor of side 8 x stride.

    Args:
        in_features: names of the maps, finest first; strides: their strides in pixels.
        anchor_scale: side of the anchor in strides.
        test_topk, test_nms, max_detections: used by ``detect`` only.
    """

    pads_candidates = True  # as in the reference

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
        super().__init__(
            num_classes=num_classes,
            embed_dim=embed_dim,
            in_features=in_features,
            strides=strides,
            assigner=assigner,
            box_code=DeltaCode((10.0, 10.0, 5.0, 5.0)),
            criterion=CenternessCriterion(box_weight=giou_weight),
            anchor_scale=anchor_scale,
            num_convs=num_convs,
            num_groups=num_groups,
            test_topk=test_topk,
            test_nms=test_nms,
            max_detections=max_detections,
        )


class PAAHead(TowerHead):
    """Dense head whose positives are chosen by their losses (Kim and Lee, ECCV 2020).

    Its assigner is a ``PAAAssigner``, its criterion an ``IoUCriterion``. Detections are scored by
    the geometric mean of class score and predicted IoU; the paper's score voting is left out.
    """

    @torch.no_grad()
    def refine(
        self, targets: DenseTargets, predictions: DensePredictions, anchors: list[Tensor]
    ) -> DenseTargets:
        costs = self.criterion.costs(predictions, torch.cat(anchors), targets, self.box_code)
        level_of = torch.cat(
            [torch.full((len(level),), i, device=costs.device) for i, level in enumerate(anchors)]
        )
        candidate = targets.positive(self.num_classes)
        rejected = torch.zeros_like(candidate)
        start = 0
        for image, rows in enumerate(candidate):
            index = rows.nonzero().squeeze(1)
            mine = costs[start : start + len(index)]
            start += len(index)
            chosen = self.assigner.select(targets.truths[image, index], level_of[index], mine)
            rejected[image, index[~chosen]] = True
        return replace(
            targets,
            labels=targets.labels.masked_fill(rejected, self.num_classes),
            boxes=targets.boxes.masked_fill(rejected[..., None], 0.0),
            truths=targets.truths.masked_fill(rejected, BACKGROUND),
        )

    def rescore(self, scores: Tensor, quality: Tensor) -> Tensor:
        return (scores * quality).sqrt()


OCTAVES, RATIOS = 3, (0.5, 1.0, 2.0)


class RetinaNetHead(DenseHead):
    """Dense head with three scales times three shapes of anchors (Lin et al., ICCV 2017).

    Args:
        anchor_scale: side of the smallest square anchor in strides.
        num_convs: convolutions per tower; the paper has four.
    """

    class_layers = {"network.cls_score": ClassRows(repeated=True)}

    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int,
        in_features: Sequence[str] = ("p3", "p4", "p5", "p6", "p7"),
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        assigner: nn.Module,
        criterion: nn.Module,
        anchor_scale: float = 4.0,
        num_convs: int = 1,
        test_topk: int = 1000,
        test_nms: float = 0.5,
        max_detections: int = 100,
    ):
        octaves = [anchor_scale * 2 ** (i / OCTAVES) for i in range(OCTAVES)]
        super().__init__(
            num_classes=num_classes,
            in_features=in_features,
            strides=strides,
            anchor_generator=DefaultAnchorGenerator(
                sizes=[[stride * octave for octave in octaves] for stride in strides],
                aspect_ratios=list(RATIOS),
                strides=list(strides),
                offset=0.0,
            ),
            assigner=assigner,
            box_code=DeltaCode(),
            criterion=criterion,
            test_topk=test_topk,
            test_nms=test_nms,
            max_detections=max_detections,
        )
        self.network = RetinaNetNetwork(
            input_shape=[ShapeSpec(channels=embed_dim) for _ in strides],
            num_classes=num_classes,
            num_anchors=self.num_anchors,
            conv_dims=[embed_dim] * num_convs,
        )

    def predict(self, maps: list[Tensor]) -> DensePredictions:
        logits, deltas = self.network(maps)
        return DensePredictions.of_levels(
            [flatten_map(level, self.num_anchors) for level in logits],
            [flatten_map(level, self.num_anchors) for level in deltas],
        )


class FCOSHead(DenseHead):
    """Dense head with one point in the middle of each cell (Tian et al., ICCV 2019).

    A point is a square of the side of the stride; as such it becomes the box of a positive query.
    Distances are predicted in strides, so that, as in Detectron2, levels need no learned scale.

    Args:
        num_convs: convolutions with GroupNorm per tower; the paper has four.
    """

    class_layers = {"network.cls_score": ClassRows()}

    def __init__(
        self,
        *,
        num_classes: int,
        embed_dim: int,
        in_features: Sequence[str] = ("p3", "p4", "p5", "p6", "p7"),
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        assigner: nn.Module,
        criterion: nn.Module,
        num_convs: int = 1,
        num_groups: int = 32,
        test_topk: int = 1000,
        test_nms: float = 0.6,
        max_detections: int = 100,
    ):
        super().__init__(
            num_classes=num_classes,
            in_features=in_features,
            strides=strides,
            anchor_generator=DefaultAnchorGenerator(
                sizes=[[stride] for stride in strides],
                aspect_ratios=[1.0],
                strides=list(strides),
                offset=0.5,
            ),
            assigner=assigner,
            box_code=DistanceCode(),
            criterion=criterion,
            test_topk=test_topk,
            test_nms=test_nms,
            max_detections=max_detections,
        )
        self.network = FCOSNetwork(
            input_shape=[ShapeSpec(channels=embed_dim) for _ in strides],
            num_classes=num_classes,
            conv_dims=[embed_dim] * num_convs,
            norm=partial(nn.GroupNorm, num_groups),
        )

    @classmethod
    def make_small(cls, node: DictConfig, num_groups: int) -> None:
        super().make_small(node, num_groups)
        node.assigner.reach = 4.0  # half of the usual ranges of sizes

    def predict(self, maps: list[Tensor]) -> DensePredictions:
        outputs = self.network(maps)
        return DensePredictions.of_levels(
            *([flatten_map(level) for level in levels] for levels in outputs)
        )


def flatten_map(x: Tensor, num_anchors: int = 1) -> Tensor:
    """Map ``(B, A*X, H, W)`` of A anchors per cell -> rows ``(B, H*W*A, X)``."""
    return x.unflatten(1, (num_anchors, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3)
