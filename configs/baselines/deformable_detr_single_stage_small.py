"""Deformable-DETR, single-stage, at the size of `co_detr_small.py`."""

from ..models.baselines import single_stage
from ..small.co_detr_small import data, dataloader, lr_multiplier, model, optimizer, train

model.auxiliary = None
single_stage(model)
optimizer.params.lr_factor_func.parts = ["reference_points"]
train.output_dir = "output/deformable_detr_single_stage_small"
