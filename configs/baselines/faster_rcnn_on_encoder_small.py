"""Faster R-CNN on the encoder in place of the decoder, at the size of `co_detr_small.py`."""

from ..models.baselines import head_on_encoder
from ..small.co_detr_small import data, dataloader, lr_multiplier, model, optimizer, train

head_on_encoder(model, "roi")
train.output_dir = "output/faster_rcnn_on_encoder_small"
