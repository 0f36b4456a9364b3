"""Co-Deformable-DETR with the mask head of Co-DINO-Inst, ResNet-50: boxes and masks, 12 epochs."""

from ..co_detr_r50 import data, dataloader, lr_multiplier, model, optimizer, train
from ..models.mask_head import mask_head

model.mask_head = mask_head
model.mask_head.strides = [8, 16, 32, 64]
model.mask_head.criterion.loss_weight = 1.0
train.output_dir = "output/co_detr_r50_instance"
