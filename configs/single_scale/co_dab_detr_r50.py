"""Co-DAB-DETR-C5: `dab_detr_r50.py` with Faster R-CNN and ATSS heads (K = 2)."""

from ..models.dab_detr import auxiliary
from .dab_detr_r50 import data, dataloader, lr_multiplier, model, optimizer, train

model.auxiliary = auxiliary
train.output_dir = "output/co_dab_detr_r50"
