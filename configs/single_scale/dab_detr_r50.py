"""DAB-DETR-C5, ResNet-50, 50 epochs, with the recipe of its code."""

from ..models.dab_detr import model
from .conditional_detr_r50 import data, dataloader, lr_multiplier, optimizer, train

train.output_dir = "output/dab_detr_r50"
