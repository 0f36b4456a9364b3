"""Faster R-CNN on the deformable encoder in place of the decoder, ResNet-50."""

from ..co_detr_r50 import data, dataloader, lr_multiplier, model, optimizer, train
from ..models.baselines import head_on_encoder

head_on_encoder(model, "roi")
train.output_dir = "output/faster_rcnn_on_encoder_r50"
