"""Backbones with the channel mapper that Co-DETR puts on them."""

from detectron2.config import LazyCall as L
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone import BasicStem, ResNet

from co_detr.modeling import ChannelMapper

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
)

mapped_resnet50 = L(ChannelMapper)(
    bottom_up=resnet50,
    in_features=["res3", "res4", "res5"],
    out_channels="${..encoder.embed_dim}",
    num_extra_levels=1,
)
