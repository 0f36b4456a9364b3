"""RetinaNet as an auxiliary head: Detectron2's network, nine anchors per location."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead as RetinaNetNetwork
from torch import Tensor, nn

from co_detr.modeling.auxiliary.box_codes import DeltaCode
from co_detr.modeling.auxiliary.dense import DensePredictions, flatten_map
from co_detr.modeling.auxiliary.dense_head import DenseHead

OCTAVES, RATIOS = 3, (0.5, 1.0, 2.0)


class RetinaNetHead(DenseHead):
    """Dense head with three scales times three shapes of anchors (Lin et al., ICCV 2017).

    Args:
        anchor_scale: side of the smallest square anchor in strides.
        num_convs: convolutions per tower; the paper has four.
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
            [flatten_map(each, self.num_anchors) for each in logits],
            [flatten_map(each, self.num_anchors) for each in deltas],
        )
