"""Deformable-DETR++ with the recipe of Co-DETR but without its auxiliary part (K = 0)."""

from ..common.coco import data, dataloader
from ..common.optim import AdamW as optimizer
from ..common.schedule import lr_multiplier
from ..common.train import train
from ..models.deformable_detr import model

train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.output_dir = "output/deformable_detr_r50"
