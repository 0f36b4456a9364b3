"""A small Co-DAB-DETR-C5 for CPUs, on the data and with the schedule of `co_detr_small.py`.

`model.auxiliary=null` trains the plain DAB-DETR of the same size.
"""

from ..co_dab_detr_r50 import model
from ..co_detr_small import data, dataloader, lr_multiplier, optimizer, train
from ..models.small import make_small_single_scale

model.num_classes = 10
make_small_single_scale(model)
train.output_dir = "output/co_dab_detr_small"
