"""Transformer backbones of the reference's releases, on Detectron2's ``Backbone`` interface."""

from co_detr.modeling.backbones.feature_pyramid import ViTPyramid
from co_detr.modeling.backbones.swin import SwinTransformer
from co_detr.modeling.backbones.vit import VisionTransformer

__all__ = ["SwinTransformer", "ViTPyramid", "VisionTransformer"]
