"""Co-Deformable-DETR, ResNet-50, with the ATSS head alone (K = 1), 12 epochs."""

from ..co_detr_r50 import data, dataloader, lr_multiplier, model, optimizer, train

del model.auxiliary.roi
train.output_dir = "output/co_detr_r50_atss"
