"""Co-Conditional-DETR-C5: `conditional_detr_r50.py` with Faster R-CNN and ATSS heads (K = 2)."""

from ..models.conditional_detr import auxiliary
from .conditional_detr_r50 import data, dataloader, lr_multiplier, model, optimizer, train

model.auxiliary = auxiliary
train.output_dir = "output/co_conditional_detr_r50"
