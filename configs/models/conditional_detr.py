"""Conditional-DETR-C5, and its auxiliary part.

``model`` has ``auxiliary=None`` (the plain Conditional-DETR); ``auxiliary`` fits it.
"""

from detectron2.config import LazyCall as L
from torch import nn

from co_detr.modeling import (
    CoDETR,
    FocalLoss,
    HungarianAssigner,
    SetCriterion,
    SinePosition,
    TopKPostprocessor,
)
from co_detr.modeling.auxiliary import SimplePyramid
from co_detr.modeling.queries import PointQueries, QuerySources
from co_detr.modeling.single_scale import ConditionalDecoder, TransformerEncoder

from .auxiliary import auxiliary
from .backbones import mapped_resnet50

# The last map alone, through a 1x1 convolution without norm.
mapped_resnet50.bottom_up.out_features = ["res5"]
mapped_resnet50.update(in_features=["res5"], num_extra_levels=0, num_groups=None)

model = L(CoDETR)(
    num_classes=80,
    backbone=mapped_resnet50,
    encoder=L(TransformerEncoder)(
        position_encoding=L(SinePosition)(
            embed_dim="${..embed_dim}", temperature=10000.0, offset=0.0
        ),
        num_layers=6,
        embed_dim=256,
        num_heads=8,
        feedforward_dim=2048,
        dropout=0.1,
        activation=nn.ReLU,
        scale_position=False,
    ),
    decoder=L(ConditionalDecoder)(
        num_classes="${..num_classes}",
        num_layers=6,
        embed_dim="${..encoder.embed_dim}",
        num_heads="${..encoder.num_heads}",
        feedforward_dim="${..encoder.feedforward_dim}",
        dropout="${..encoder.dropout}",
        activation="${..encoder.activation}",
        eps=1e-5,
    ),
    queries=L(QuerySources)(
        matching=L(PointQueries)(num_queries=300, embed_dim="${...encoder.embed_dim}")
    ),
    assigner=L(HungarianAssigner)(class_weight=2.0, bbox_weight=5.0, giou_weight=2.0),
    criterion=L(SetCriterion)(
        num_classes="${..num_classes}",
        classification=L(FocalLoss)(alpha=0.25, gamma=2.0),
        class_weight=2.0,
        bbox_weight=5.0,
        giou_weight=2.0,
    ),
    postprocessor=L(TopKPostprocessor)(max_detections=100),
    auxiliary=None,
)

auxiliary.pyramid = L(SimplePyramid)(
    embed_dim="${...encoder.embed_dim}", stride=32, strides="${..atss.strides}", num_groups=32
)
