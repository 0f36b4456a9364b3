"""Co-Deformable-DETR, Swin-T, 12 epochs."""

from ..co_detr_r50 import data, dataloader, lr_multiplier, model, optimizer, train
from ..common.pretrained import SWIN_T
from ..models.backbones import mapped_swin_t

model.backbone = mapped_swin_t
optimizer.weight_decay = 0.05
train.init_checkpoint = SWIN_T
train.output_dir = "output/co_deformable_detr_swin_t_12ep"
