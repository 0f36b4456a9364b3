"""Backbones on Detectron2's ``Backbone`` interface, and what makes levels of their maps."""

from co_detr.modeling.backbones.resnet import ChannelMapper, ResNet
from co_detr.modeling.backbones.swin import SwinTransformer
from co_detr.modeling.backbones.timm import TimmBackbone
from co_detr.modeling.backbones.vit import VisionTransformer, ViTPyramid

__all__ = [
    "ChannelMapper",
    "ResNet",
    "SwinTransformer",
    "TimmBackbone",
    "ViTPyramid",
    "VisionTransformer",
]
