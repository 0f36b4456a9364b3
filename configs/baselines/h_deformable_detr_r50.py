"""H-Deformable-DETR (hybrid matching), ResNet-50, with the recipe of Co-DETR."""

from ..co_deformable_detr.deformable_detr_r50 import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)
from ..models.baselines import hybrid_matching

hybrid_matching(model)
train.output_dir = "output/h_deformable_detr_r50"
