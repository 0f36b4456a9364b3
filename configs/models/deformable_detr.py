"""Deformable-DETR++: two-stage, mixed query selection, look forward twice; no auxiliary part."""

from detectron2.config import LazyCall as L

from co_detr.modeling import (
    CoDETR,
    DeformableDecoder,
    DeformableEncoder,
    FocalLoss,
    HungarianAssigner,
    SetCriterion,
    SinePosition,
    TopKPostprocessor,
)
from co_detr.modeling.queries import QuerySources, TwoStageQueries

from .backbones import mapped_resnet50

model = L(CoDETR)(
    num_classes=80,
    backbone=mapped_resnet50,
    encoder=L(DeformableEncoder)(
        position_encoding=L(SinePosition)(
            embed_dim="${..embed_dim}", temperature=10000.0, offset=-0.5
        ),
        num_layers=6,
        embed_dim=256,
        num_heads=8,
        num_levels=4,
        num_points=4,
        feedforward_dim=2048,
        dropout=0.0,
        activation_checkpointing=False,
    ),
    decoder=L(DeformableDecoder)(
        num_classes="${..num_classes}",
        num_layers=6,
        embed_dim="${..encoder.embed_dim}",
        num_heads="${..encoder.num_heads}",
        num_levels="${..encoder.num_levels}",
        num_points="${..encoder.num_points}",
        feedforward_dim="${..encoder.feedforward_dim}",
        dropout="${..encoder.dropout}",
        look_forward_twice=True,
    ),
    queries=L(QuerySources)(
        matching=L(TwoStageQueries)(
            num_queries=300,
            num_classes="${...num_classes}",
            embed_dim="${...encoder.embed_dim}",
        ),
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
