"""Co-DINO, ResNet-50, large-scale jitter, 12 epochs."""

from ..common.lsj import use_lsj
from .co_dino_r50 import data, dataloader, lr_multiplier, model, optimizer, train

use_lsj(model, dataloader, size=1024)
train.output_dir = "output/co_dino_r50_lsj_12ep"
