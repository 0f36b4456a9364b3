"""DINO over five levels from stride 4, and the auxiliary part of Co-DINO for it.

``model`` has ``auxiliary=None`` (the plain DINO); ``auxiliary`` fits it.
"""

from detectron2.config import LazyCall as L

from co_detr.modeling import QualityFocalLoss, ReferencePosition, SoftNMSPostprocessor
from co_detr.modeling.queries import DenoisingQueries, QuerySources, TwoStageQueries

from .auxiliary import auxiliary
from .deformable_detr import model

bottom_up_features = ["res2", "res3", "res4", "res5"]
model.backbone.bottom_up.out_features = bottom_up_features
model.backbone.in_features = bottom_up_features
model.encoder.num_levels = 5
model.encoder.position_encoding.update(temperature=20.0, offset=0.0)
model.decoder.update(
    eps=1e-3,
    query_position=L(ReferencePosition)(embed_dim="${..embed_dim}"),
    normalize_output=True,
)
model.queries = L(QuerySources)(
    matching=L(TwoStageQueries)(
        num_queries=900,
        num_classes="${...num_classes}",
        embed_dim="${...encoder.embed_dim}",
        ranking="best_class",
        with_position=False,
    ),
    denoising=L(DenoisingQueries)(
        num_queries=100,
        num_classes="${...num_classes}",
        embed_dim="${...encoder.embed_dim}",
        label_noise=0.5,
        box_noise=1.0,
        sees="matching",
    ),
)
model.criterion.update(classification=L(QualityFocalLoss)(beta=2.0), class_weight=1.0)
model.postprocessor = L(SoftNMSPostprocessor)(max_detections=300, iou_threshold=0.8)

levels = ["p2", "p3", "p4", "p5", "p6", "p7"]
strides = [4, 8, 16, 32, 64, 128]
auxiliary.pyramid.finest = 2
auxiliary.positive_queries.with_features = False
auxiliary.atss.update(in_features=levels, strides=strides)
auxiliary.roi.rpn.in_features = levels
auxiliary.roi.rpn.anchor_generator.update(
    sizes=[[4 * stride * 2 ** (i / 3) for i in range(3)] for stride in strides],
    strides=strides,
)
# Boxes under 112 pixels are pooled at stride 4, as with the reference's finest scale 56.
auxiliary.roi.roi_heads.box_in_features = levels[:-1]
auxiliary.roi.roi_heads.box_pooler.scales = tuple(1 / stride for stride in strides[:-1])
