"""Group-DETR with 11 groups on Deformable-DETR++, ResNet-50, with the recipe of Co-DETR."""

from ..co_deformable_detr.deformable_detr_r50 import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)
from ..models.baselines import query_groups

query_groups(model)
train.output_dir = "output/group_detr_r50"
