"""The model and its parts."""

from co_detr.modeling.backbones.resnet import ChannelMapper
from co_detr.modeling.co_detr import CoDETR
from co_detr.modeling.geometry import BatchPadding, SinePosition
from co_detr.modeling.losses import FocalLoss, HungarianAssigner, QualityFocalLoss, SetCriterion
from co_detr.modeling.postprocess import SoftNMSPostprocessor, TopKPostprocessor
from co_detr.modeling.transformer import DeformableDecoder, DeformableEncoder, ReferencePosition

__all__ = [
    "BatchPadding",
    "ChannelMapper",
    "CoDETR",
    "DeformableDecoder",
    "DeformableEncoder",
    "FocalLoss",
    "HungarianAssigner",
    "QualityFocalLoss",
    "ReferencePosition",
    "SetCriterion",
    "SinePosition",
    "SoftNMSPostprocessor",
    "TopKPostprocessor",
]
