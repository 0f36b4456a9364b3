"""FCOS as an auxiliary head: Detectron2's network, points instead of anchors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.fcos import FCOSHead as FCOSNetwork
from torch import Tensor, nn

from co_detr.modeling.auxiliary.box_codes import DistanceCode
from co_detr.modeling.auxiliary.dense import DensePredictions, flatten_map
from co_detr.modeling.auxiliary.dense_head import DenseHead


class FCOSHead(DenseHead):
    """Dense head with one point in the middle of each cell (Tian et al., ICCV 2019).

    A point is a square of the side of the stride; as such it becomes the box of a positive query.
    Distances are predicted in strides, so that, as in Detectron2, levels need no learned scale.

    Args:
        num_convs: convolutions with GroupNorm per tower; the paper has four.
    """

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

    def predict(self, maps: list[Tensor]) -> DensePredictions:
        outputs = self.network(maps)
        return DensePredictions.of_levels(
            *([flatten_map(level) for level in levels] for levels in outputs)
        )
