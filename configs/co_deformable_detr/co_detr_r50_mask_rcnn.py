"""Co-Deformable-DETR, ResNet-50, Mask R-CNN and ATSS heads (K = 2), 12 epochs.

The decoder detects boxes; the detector `roi` of the trained model also gives masks.
"""

from ..co_detr_r50 import data, dataloader, lr_multiplier, model, optimizer, train
from ..models.auxiliary import mask_branch

model.auxiliary.roi.roi_heads.update(mask_branch)
train.output_dir = "output/co_detr_r50_mask_rcnn"
