"""H-Deformable-DETR (hybrid matching) at the size of `co_detr_small.py`."""

from ..models.baselines import hybrid_matching
from ..small.co_detr_small import data, dataloader, lr_multiplier, model, optimizer, train

model.auxiliary = None
hybrid_matching(model, num_extra=300)
train.output_dir = "output/h_deformable_detr_small"
