"""Co-DINO, Swin-L, large-scale jitter, 12 epochs."""

from ..common.lsj import use_lsj
from .co_dino_swin_l_12ep import data, dataloader, lr_multiplier, model, optimizer, train

use_lsj(model, dataloader, size=1280)
train.output_dir = "output/co_dino_swin_l_lsj_12ep"
