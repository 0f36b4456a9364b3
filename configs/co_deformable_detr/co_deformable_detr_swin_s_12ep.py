"""Co-Deformable-DETR, Swin-S, 12 epochs."""

from ..co_detr_r50 import data, dataloader, lr_multiplier, model, optimizer, train
from ..common.pretrained import SWIN_S
from ..models.backbones import mapped_swin_s

model.backbone = mapped_swin_s
optimizer.weight_decay = 0.05
train.init_checkpoint = SWIN_S
train.output_dir = "output/co_deformable_detr_swin_s_12ep"
