"""The auxiliary part of Co-DETR: Faster R-CNN and ATSS heads with customized positive queries.

More heads for ``auxiliary.update(...)`` follow. The interpolations reach the model that the node is
attached to as ``model.auxiliary``.
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
)

from co_detr.modeling.auxiliary import (
    ATSSAssigner,
    ATSSHead,
    CenternessCriterion,
    CenterSamplingAssigner,
    CollaborativeROIHeads,
    CollaborativeRPN,
    DeltaCode,
    DistributionCode,
    DistributionCriterion,
    ExtraLevel,
    FasterRCNNHead,
    FCOSHead,
    HybridAssignmentHeads,
    IoUCriterion,
    MaxIoUAssigner,
    PAAAssigner,
    PAAHead,
    RetinaNetHead,
    SmoothL1Criterion,
    TowerHead,
)
from co_detr.modeling.detectors import CascadeDetector, MergedDetector
from co_detr.modeling.queries import PositiveQueries

rpn = L(CollaborativeRPN)(
    in_features=["p3", "p4", "p5", "p6", "p7"],
    head=L(StandardRPNHead)(in_channels="${.....encoder.embed_dim}", num_anchors=9),
    anchor_generator=L(DefaultAnchorGenerator)(
        # three octave scales of four strides, as RetinaNet has them
        sizes=[[size * 2 ** (i / 3) for i in range(3)] for size in (32, 64, 128, 256, 512)],
        aspect_ratios=[0.5, 1.0, 2.0],
        strides=[8, 16, 32, 64, 128],
        offset=0.0,
    ),
    anchor_matcher=L(Matcher)(
        thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
    ),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    batch_size_per_image=256,
    positive_fraction=0.5,
    pre_nms_topk=(4000, 1000),
    post_nms_topk=(1000, 1000),
    nms_thresh=0.7,
    smooth_l1_beta=0.0,
)

roi_heads = L(CollaborativeROIHeads)(
    num_classes="${....num_classes}",
    batch_size_per_image=512,
    positive_fraction=0.25,
    proposal_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False),
    box_in_features=["p3", "p4", "p5", "p6"],
    # Detectron2's canonical size 224 at level 4 puts boxes under 224 pixels on stride 8, as the
    # reference's finest scale 112 does.
    box_pooler=L(ROIPooler)(
        output_size=7,
        scales=(1 / 8, 1 / 16, 1 / 32, 1 / 64),
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
    ),
    box_head=L(FastRCNNConvFCHead)(
        input_shape=L(ShapeSpec)(channels="${......encoder.embed_dim}", height=7, width=7),
        conv_dims=[],
        fc_dims=[1024, 1024],
    ),
    box_predictor=L(FastRCNNOutputLayers)(
        input_shape=L(ShapeSpec)(channels="${...box_head.fc_dims.1}"),
        num_classes="${..num_classes}",
        box2box_transform=L(Box2BoxTransform)(weights=(10.0, 10.0, 5.0, 5.0)),
        test_score_thresh=0.0,
        test_nms_thresh=0.5,
        test_topk_per_image=100,
        box_reg_loss_type="giou",
        loss_weight={"loss_cls": 1.0, "loss_box_reg": 10.0},
    ),
)

# For roi_heads.update(...): Mask R-CNN, which has the data read masks by itself (common/coco.py).
mask_branch = dict(
    mask_in_features=["p3", "p4", "p5", "p6"],
    mask_pooler=L(ROIPooler)(
        output_size=14,
        scales=(1 / 8, 1 / 16, 1 / 32, 1 / 64),
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
    ),
    mask_head=L(MaskRCNNConvUpsampleHead)(
        input_shape=L(ShapeSpec)(channels="${......encoder.embed_dim}", height=14, width=14),
        num_classes="${..num_classes}",
        conv_dims=[256, 256, 256, 256, 256],
    ),
)

auxiliary = L(HybridAssignmentHeads)(
    pyramid=L(ExtraLevel)(embed_dim="${...encoder.embed_dim}"),
    positive_queries=L(PositiveQueries)(
        num_classes="${...num_classes}",
        embed_dim="${...encoder.embed_dim}",
        with_features=True,
        padding="negatives",
        min_queries=9,
        max_queries=300,
        loss_weight=1.0,  # lambda_1
    ),
    num_decoder_layers="${..decoder.num_layers}",
    lambda_2=2.0,
    # For inference: what heads and decoder detect together, see docs/detectors.md.
    merged=L(MergedDetector)(nms_threshold=0.6, members=None),
    cascade=L(CascadeDetector)(head=None, box_share=0.25, score_share=0.0),
    roi=L(FasterRCNNHead)(rpn=rpn, roi_heads=roi_heads),
    atss=L(ATSSHead)(
        num_classes="${...num_classes}",
        embed_dim="${...encoder.embed_dim}",
        in_features=["p3", "p4", "p5", "p6", "p7"],
        strides=[8, 16, 32, 64, 128],
        assigner=L(ATSSAssigner)(topk=9),
    ),
)

retinanet = L(RetinaNetHead)(
    num_classes="${...num_classes}",
    embed_dim="${...encoder.embed_dim}",
    in_features=["p3", "p4", "p5", "p6", "p7"],
    strides=[8, 16, 32, 64, 128],
    assigner=L(MaxIoUAssigner)(background_below=0.4, foreground_from=0.5),
    criterion=L(SmoothL1Criterion)(class_weight=1.0, box_weight=1.0),
)

fcos = L(FCOSHead)(
    num_classes="${...num_classes}",
    embed_dim="${...encoder.embed_dim}",
    in_features=["p3", "p4", "p5", "p6", "p7"],
    strides=[8, 16, 32, 64, 128],
    assigner=L(CenterSamplingAssigner)(radius=1.5),
    criterion=L(CenternessCriterion)(class_weight=1.0, box_weight=1.0, quality_weight=1.0),
)

paa = L(PAAHead)(
    num_classes="${...num_classes}",
    embed_dim="${...encoder.embed_dim}",
    in_features=["p3", "p4", "p5", "p6", "p7"],
    strides=[8, 16, 32, 64, 128],
    assigner=L(PAAAssigner)(candidate_iou=0.1, topk=9),
    box_code=L(DeltaCode)(weights=(10.0, 10.0, 5.0, 5.0)),
    criterion=L(IoUCriterion)(class_weight=1.0, box_weight=1.3, quality_weight=0.5),
)

gfl = L(TowerHead)(
    num_classes="${...num_classes}",
    embed_dim="${...encoder.embed_dim}",
    in_features=["p3", "p4", "p5", "p6", "p7"],
    strides=[8, 16, 32, 64, 128],
    anchor_scale=8.0,
    assigner=L(ATSSAssigner)(topk=9),
    box_code=L(DistributionCode)(max_distance=16, anchor_scale="${..anchor_scale}"),
    criterion=L(DistributionCriterion)(class_weight=1.0, box_weight=2.0, distribution_weight=0.25),
)
