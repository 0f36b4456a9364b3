"""The quick start with masks: a lean mask head, which adds a third to the time of a step."""

from .models.mask_head import mask_head
from .models.small import STRIDES
from .quickstart import data, dataloader, lr_multiplier, model, optimizer, train

model.mask_head = mask_head
model.mask_head.update(strides=STRIDES[:3], width=32, num_semantic_convs=1)
model.mask_head.sampler.max_positives = 3
model.mask_head.iou_head.update(conv_dim=32, fc_dim=64)
train.eval_period = 350  # masks of 100 detections take longer than their image
train.output_dir = "output/quickstart_masks"
