"""Dense head with two towers of convolutions and one square anchor per cell."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import Tensor, nn

from co_detr.modeling.auxiliary.box_codes import BoxCode
from co_detr.modeling.auxiliary.dense import DensePredictions, flatten_map
from co_detr.modeling.auxiliary.dense_head import DenseHead


class TowerHead(DenseHead):
    """The network of ATSS, PAA and GFL: towers with GroupNorm, a scale per level for the boxes.

    Args:
        assigner, box_code, criterion: what makes it one head or the other; see `DenseHead`.
        anchor_scale: side of the anchor in strides; its centre is the corner of the cell.
        num_convs: convolutions per tower; Co-DETR has one, the papers of the heads four.
    """

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
        self.centreness = nn.Conv2d(embed_dim, 1, 3, padding=1) if criterion.has_quality else None
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
            if self.centreness is not None:
                quality.append(flatten_map(self.centreness(box_features)))
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
