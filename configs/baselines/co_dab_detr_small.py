"""A small single-scale Co-DAB-DETR that learns the generated digits on a CPU.

On the map of stride 16, with the encoder's proposals as queries. `model.auxiliary=null` trains the
plain DAB-DETR of the same size.
"""

from ..models.small import make_small_single_scale
from ..single_scale.co_dab_detr_r50 import model
from ..small.co_detr_small import data, dataloader, lr_multiplier, optimizer, train

model.num_classes = 10
model.compare_detectors = True
make_small_single_scale(model)
dataloader.train.mapper.augmentations.flip_probability = 0.0  # a mirrored digit is no digit
optimizer.lr = 1e-3
train.output_dir = "output/co_dab_detr_small"
