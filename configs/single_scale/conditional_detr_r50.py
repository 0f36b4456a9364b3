"""Conditional-DETR-C5, ResNet-50, 50 epochs, with the recipe of its code."""

from ..common.coco import data, dataloader
from ..common.optim import AdamW as optimizer
from ..common.schedule import lr_multiplier, set_epochs
from ..common.train import train
from ..models.conditional_detr import model

optimizer.lr = 1e-4
set_epochs(train, lr_multiplier, epochs=50, drops=[40])
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.output_dir = "output/conditional_detr_r50"
