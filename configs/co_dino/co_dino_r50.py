"""Co-DINO, ResNet-50, five levels, Faster R-CNN and ATSS heads (K = 2), 12 epochs."""

from ..common.coco import data, dataloader
from ..common.optim import AdamW as optimizer
from ..common.schedule import lr_multiplier
from ..common.train import train
from ..models.co_dino import auxiliary, model

model.auxiliary = auxiliary
optimizer.params.lr_factor_func.parts = []  # sampling offsets learn at the full rate
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.output_dir = "output/co_dino_r50"
