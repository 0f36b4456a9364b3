"""Co-DINO with nine encoder layers, ResNet-50, large-scale jitter, 36 epochs."""

from ..common.schedule import set_epochs
from .co_dino_r50_9enc_lsj_12ep import data, dataloader, lr_multiplier, model, optimizer, train

set_epochs(train, lr_multiplier, epochs=36, drops=[30])
train.output_dir = "output/co_dino_r50_9enc_lsj_36ep"
