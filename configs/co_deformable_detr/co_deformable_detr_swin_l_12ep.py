"""Co-Deformable-DETR, Swin-L, 12 epochs."""

from ..co_detr_r50 import data, dataloader, lr_multiplier, model, optimizer, train
from ..common.pretrained import SWIN_L
from ..models.backbones import mapped_swin_l

model.backbone = mapped_swin_l
optimizer.weight_decay = 0.05
train.init_checkpoint = SWIN_L
train.output_dir = "output/co_deformable_detr_swin_l_12ep"
