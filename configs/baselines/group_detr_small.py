"""Group-DETR with 6 groups on Deformable-DETR++ at the size of `co_detr_small.py`."""

from ..co_detr_small import data, dataloader, lr_multiplier, model, optimizer, train
from ..models.baselines import query_groups

model.auxiliary = None
query_groups(model, count=6)
train.output_dir = "output/group_detr_small"
