"""Co-DINO, Swin-L, 24 epochs."""

from ..common.schedule import set_epochs
from .co_dino_swin_l_12ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.drop_path_rate = 0.5
set_epochs(train, lr_multiplier, epochs=24, drops=[20])
train.output_dir = "output/co_dino_swin_l_24ep"
