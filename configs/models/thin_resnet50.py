"""ResNet-50 of half the usual width with its channel mapper, in the variant of Caffe.

Batch norm is frozen, the stride is in the first 1x1 convolution, images are BGR without scaling.
"""

from detectron2.config import LazyCall as L
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone import BasicStem

from co_detr.modeling import ChannelMapper
from co_detr.modeling.backbones.resnet import ResNet, resnet_stages

mapped_thin_resnet50 = L(ChannelMapper)(
    bottom_up=L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm=FrozenBatchNorm2d),
        stages=L(resnet_stages)(
            depth=50,
            stem_channels=64,
            res2_channels=128,
            norm=FrozenBatchNorm2d,
            stride_in_1x1=True,
        ),
        out_features=["res3", "res4", "res5"],
        freeze_at=2,
        activation_checkpointing=False,
    ),
    in_features=["res3", "res4", "res5"],
    out_channels="${..encoder.embed_dim}",
    num_extra_levels=1,
)

pixel_mean = [104.0, 117.0, 123.0]
pixel_std = [1.0, 1.0, 1.0]
