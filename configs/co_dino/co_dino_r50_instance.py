"""Co-DINO-Inst, ResNet-50: boxes and masks, 12 epochs."""

from ..models.mask_head import mask_head
from .co_dino_r50 import data, dataloader, lr_multiplier, model, optimizer, train

model.mask_head = mask_head
model.mask_head.criterion.loss_weight = 1.0
train.output_dir = "output/co_dino_r50_instance"
