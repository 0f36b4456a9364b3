"""Co-Deformable-DETR, Swin-B, 12 epochs."""

from ..co_detr_r50 import data, dataloader, lr_multiplier, model, optimizer, train
from ..common.pretrained import SWIN_B
from ..models.backbones import mapped_swin_b

model.backbone = mapped_swin_b
optimizer.weight_decay = 0.05
train.init_checkpoint = SWIN_B
train.output_dir = "output/co_deformable_detr_swin_b_12ep"
