"""Co-Deformable-DETR, ConvNeXt-T of timm, 12 epochs.

`model.backbone.bottom_up.name=NAME` takes another backbone of timm, see docs/backbones.md.
"""

from ..co_detr_r50 import data, dataloader, lr_multiplier, model, optimizer, train
from ..models.backbones import mapped_timm, use_timm

use_timm(model, train, mapped_timm)
model.backbone.bottom_up.drop_path_rate = 0.2
optimizer.weight_decay = 0.05
train.output_dir = "output/co_detr_convnext_t"
