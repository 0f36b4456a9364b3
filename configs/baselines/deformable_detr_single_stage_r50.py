"""Deformable-DETR, single-stage, ResNet-50, with the recipe of Co-DETR."""

from ..co_deformable_detr.deformable_detr_r50 import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)
from ..models.baselines import single_stage

single_stage(model)
train.output_dir = "output/deformable_detr_single_stage_r50"
