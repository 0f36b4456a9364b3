"""Group-DETR with 6 groups on Deformable-DETR++ at the size of `co_detr_small.py`."""

from ..models.baselines import query_groups
from ..small.co_detr_small import data, dataloader, lr_multiplier, model, optimizer, train

model.auxiliary = None
query_groups(model, count=6)
train.output_dir = "output/group_detr_small"
