"""Co-Deformable-DETR, Swin-T, 36 epochs."""

from ..common.schedule import set_epochs
from .co_deformable_detr_swin_t_12ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.drop_path_rate = 0.3
set_epochs(train, lr_multiplier, epochs=36, drops=[30])
train.output_dir = "output/co_deformable_detr_swin_t_36ep"
