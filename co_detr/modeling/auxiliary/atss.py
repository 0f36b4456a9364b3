"""ATSS as an auxiliary head: one square anchor per location, dense one-to-many assignment."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from co_detr.modeling.auxiliary.assigners import ATSSAssigner
from co_detr.modeling.auxiliary.box_codes import DeltaCode
from co_detr.modeling.auxiliary.dense import DenseTargets
from co_detr.modeling.auxiliary.dense_criteria import CentrenessCriterion
from co_detr.modeling.auxiliary.towers import TowerHead


class ATSSHead(TowerHead):
    """Dense head with focal, centreness-weighted GIoU and centreness losses.

    Source: ATSS (CVPR 2020); mmdet ``ATSSHead`` as configured by Co-DETR: one convolution with
    GroupNorm per tower, one anchor of side 8 x stride.

    Args:
        in_features: names of the maps, finest first; strides: their strides in pixels.
        anchor_scale: side of the anchor in strides.
        test_topk, test_nms, max_detections: used by ``detect`` only.
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
        super().__init__(
            num_classes=num_classes,
            embed_dim=embed_dim,
            in_features=in_features,
            strides=strides,
            assigner=assigner,
            box_code=DeltaCode((10.0, 10.0, 5.0, 5.0)),
            criterion=CentrenessCriterion(box_weight=giou_weight),
            anchor_scale=anchor_scale,
            num_convs=num_convs,
            num_groups=num_groups,
            test_topk=test_topk,
            test_nms=test_nms,
            max_detections=max_detections,
        )

    def candidate_labels(self, targets: DenseTargets) -> Tensor:
        """As in the reference, anchors in the padding stay in the pool of background candidates,
        as empty boxes at the origin."""
        return targets.labels
