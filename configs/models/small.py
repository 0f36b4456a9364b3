"""Shrinks a model to what two CPU cores train from scratch in minutes on small images."""

from detectron2.config import LazyCall as L

from co_detr.modeling import ReferencePosition
from co_detr.modeling.auxiliary import DenseHead, HybridAssignmentHeads
from co_detr.modeling.backbones.resnet import resnet_stages
from co_detr.modeling.postprocess import SoftNMSPostprocessor
from co_detr.modeling.queries import TwoStageQueries

LEVELS = ["p3", "p4", "p5", "p6"]  # three of the encoder and the extra one of the heads
STRIDES = [8, 16, 32, 64]
NUM_QUERIES = 60


def make_small(model):
    """In place: thin ResNet-18 (group norm, nothing frozen), three levels, width 96, two encoder
    and three decoder layers, 60 queries, and heads to match for objects of 24 to 64 pixels."""
    _make_small_transformer(model)
    model.backbone.bottom_up.out_features = model.backbone.in_features = ["res3", "res4", "res5"]
    model.backbone.num_extra_levels = 0
    model.backbone.num_groups = 16
    model.encoder.update(num_levels=3, strides=STRIDES[:3])
    model.auxiliary.pyramid.finest = 3
    _make_small_heads(model.auxiliary)


def make_quick_to_learn(model):
    """In place: queries that detect after hundreds of steps instead of tens of thousands.

    The recipe's queries know where they start and have to learn by attention what is there. Here
    they begin with the feature of the token that proposed them, as positive queries do with that of
    their candidate; every decoder layer codes the boxes that the one before has refined, as DINO
    has it; and positive queries leave self-attention to the matched ones. Self-attention that has
    learned for so short leaves a second box at many an object, so that detections go through
    soft-NMS, as Co-DINO's do. docs/evidence.md has what was tried, and what it gave.
    """
    model.decoder.query_position = L(ReferencePosition)(embed_dim="${..embed_dim}")
    model.queries.matching.update(with_position=False, with_features=True)
    model.auxiliary.positive_queries.update(with_position=False, self_attention="self")
    model.postprocessor = L(SoftNMSPostprocessor)(max_detections=100, iou_threshold=0.6)


def make_small_single_scale(model):
    """The same for a model that encodes one map of its backbone. It takes the one of stride 16: in
    cells of 32 pixels an object of 24 is less than one. The queries are the encoder's proposals,
    since learned anchors and points do not find the objects in the time that this is made for."""
    _make_small_transformer(model)
    model.backbone.bottom_up.out_features = model.backbone.in_features = ["res4"]
    model.backbone.num_groups = 16
    model.encoder.stride = model.auxiliary.pyramid.stride = 16
    model.queries.matching = L(TwoStageQueries)(
        num_queries=NUM_QUERIES,
        num_classes="${...num_classes}",
        embed_dim="${...encoder.embed_dim}",
        with_position=model.auxiliary.positive_queries.get("with_position", True),
        with_features=True,
    )
    model.criterion.class_weight = 2.0
    model.postprocessor = L(SoftNMSPostprocessor)(max_detections=100, iou_threshold=0.6)
    _make_small_heads(model.auxiliary)


def _make_small_transformer(model):
    bottom_up = model.backbone.bottom_up
    bottom_up.stem.update(out_channels=32, norm="GN")
    bottom_up.stages = L(resnet_stages)(depth=18, stem_channels=32, res2_channels=32, norm="GN")
    bottom_up.freeze_at = 0
    model.encoder.update(embed_dim=96, num_heads=4, num_layers=2, feedforward_dim=256)
    model.decoder.num_layers = 3
    model.queries.matching.num_queries = NUM_QUERIES


def _make_small_heads(auxiliary):
    auxiliary.pyramid.num_groups = 16
    auxiliary.positive_queries.max_queries = 60
    for name in HybridAssignmentHeads.head_names(auxiliary):
        head = auxiliary[name]
        if issubclass(head._target_, DenseHead):
            head.update(in_features=LEVELS, strides=STRIDES)
            head._target_.make_small(head, num_groups=16)
    rpn, roi_heads = auxiliary.roi.rpn, auxiliary.roi.roi_heads
    rpn.in_features = LEVELS
    # Anchors at half the usual scale.
    rpn.anchor_generator.sizes = [[2 * s * 2 ** (i / 3) for i in range(3)] for s in STRIDES]
    rpn.anchor_generator.strides = STRIDES
    rpn.pre_nms_topk = (500, 500)
    rpn.post_nms_topk = (200, 100)
    roi_heads.batch_size_per_image = 64
    roi_heads.box_in_features = LEVELS[:3]
    roi_heads.box_pooler.scales = tuple(1 / stride for stride in STRIDES[:3])
    roi_heads.box_head.fc_dims = [192, 192]
