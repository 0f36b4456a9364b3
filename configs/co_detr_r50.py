"""Co-Deformable-DETR, ResNet-50, Faster R-CNN and ATSS heads (K = 2), 12 epochs."""

from .co_deformable_detr.deformable_detr_r50 import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)
from .models.auxiliary import auxiliary

model.auxiliary = auxiliary
train.output_dir = "output/co_detr_r50"
