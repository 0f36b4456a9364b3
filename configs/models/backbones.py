"""Backbones with the channel mapper that Co-DETR puts on them."""

from detectron2.config import LazyCall as L
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone import BasicStem

from co_detr.modeling import ChannelMapper
from co_detr.modeling.backbones import (
    SwinTransformer,
    TimmBackbone,
    VisionTransformer,
    ViTPyramid,
)
from co_detr.modeling.backbones.resnet import ResNet
from co_detr.modeling.backbones.timm import ADDRESS, pixel_mean, pixel_std

# torchvision's variant of ResNet-50 (stride in the 3x3 convolution, RGB); stem and res2 frozen.
resnet50 = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=64, norm=FrozenBatchNorm2d),
    stages=L(ResNet.make_default_stages)(
        depth=50,
        stride_in_1x1=False,
        norm=FrozenBatchNorm2d,
    ),
    out_features=["res3", "res4", "res5"],
    freeze_at=2,
    activation_checkpointing=False,
)

mapped_resnet50 = L(ChannelMapper)(
    bottom_up=resnet50,
    in_features=["res3", "res4", "res5"],
    out_channels="${..encoder.embed_dim}",
    num_extra_levels=1,
)


def _mapped_swin(**settings):
    """Levels of strides 8 to 64. Strides 4 to 64 need one override:
    ``bottom_up.out_features=["stage0", "stage1", "stage2", "stage3"]``."""
    return L(ChannelMapper)(
        bottom_up=L(SwinTransformer)(
            out_features=["stage1", "stage2", "stage3"],
            size_divisibility=0,
            activation_checkpointing=False,
            **settings,
        ),
        in_features="${.bottom_up.out_features}",
        out_channels="${..encoder.embed_dim}",
        num_extra_levels=1,
    )


# T and S: pretrained on ImageNet-1k with 224 x 224 pixels; B and L: ImageNet-22k, 384 x 384.
mapped_swin_t = _mapped_swin(
    embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7, drop_path_rate=0.2
)
mapped_swin_s = _mapped_swin(
    embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7, drop_path_rate=0.2
)
mapped_swin_b = _mapped_swin(
    embed_dim=128,
    depths=[2, 2, 18, 2],
    num_heads=[4, 8, 16, 32],
    window_size=12,
    drop_path_rate=0.2,
)
mapped_swin_l = _mapped_swin(
    embed_dim=192,
    depths=[2, 2, 18, 2],
    num_heads=[6, 12, 24, 48],
    window_size=12,
    drop_path_rate=0.3,
)


def _mapped_vit_l(**settings):
    """Levels of strides 4 to 64."""
    return L(ViTPyramid)(
        bottom_up=L(VisionTransformer)(
            embed_dim=1024,
            depth=24,
            num_heads=16,
            mlp_ratio=4 * 2 / 3,
            patch_size=16,
            pretrain_image_size=512,
            size_divisibility=32,
            activation_checkpointing=True,
            **settings,
        ),
        out_channels="${..encoder.embed_dim}",
    )


# The reference's ViT-L for COCO, and its variant for LVIS on squares of 1536 pixels.
mapped_vit_l = _mapped_vit_l(
    window_size=24,
    global_blocks=[3, 7, 11, 15, 19, 23],
    drop_path_rate=0.4,
    square_size=0,
)
mapped_vit_l_lsj = _mapped_vit_l(
    window_size=16,
    global_blocks=[2, 5, 8, 11, 14, 17, 20, 23],
    drop_path_rate=0.3,
    square_size=1536,
)

# Of the package timm; use_timm puts one of them into a model.
mapped_timm = L(ChannelMapper)(
    bottom_up=L(TimmBackbone)(
        name="convnext_tiny.fb_in22k_ft_in1k",
        in_channels=3,
        out_indices=None,
        drop_path_rate=0.0,
        freeze_batch_norm=True,
        size_divisibility=None,
        activation_checkpointing=False,
        model_options={},
    ),
    in_features=["c3", "c4", "c5"],
    out_channels="${..encoder.embed_dim}",
    num_extra_levels=1,
)

# Plain transformers with patches of 16 pixels; levels of strides 4 to 64.
pyramid_on_timm = L(ViTPyramid)(
    bottom_up=L(TimmBackbone)(
        name="vit_small_patch16_dinov3.lvd1689m",
        in_channels=3,
        out_indices=None,
        drop_path_rate=0.0,
        freeze_batch_norm=True,
        size_divisibility=32,
        activation_checkpointing=True,
        model_options={},
    ),
    out_channels="${..encoder.embed_dim}",
)


def use_timm(model, train, backbone):
    """Puts a backbone of timm into a model, with the normalization and the weights of its name.

    Both follow `model.backbone.bottom_up.name`, also when that is changed on the command line.
    """
    model.backbone = backbone
    of_backbone = dict(
        name="${..backbone.bottom_up.name}", in_channels="${..backbone.bottom_up.in_channels}"
    )
    model.pixel_mean = L(pixel_mean)(**of_backbone)
    model.pixel_std = L(pixel_std)(**of_backbone)
    train.init_checkpoint = f"{ADDRESS}${{model.backbone.bottom_up.name}}"
