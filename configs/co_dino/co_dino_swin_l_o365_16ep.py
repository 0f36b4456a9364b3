"""Co-DINO, Swin-L, from Objects365 to COCO, 16 epochs.

Starts from the reference's Objects365 checkpoint, whose class heads have 365 classes and so are
initialized anew.
"""

from ..common.high_resolution import use_high_resolution
from ..common.schedule import set_epochs
from .co_dino_swin_l_12ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.update(size_divisibility=32, activation_checkpointing=True)
model.queries.denoising.update(num_queries=500, box_noise=0.4)
use_high_resolution(dataloader, max_size=2048)
optimizer.lr = 1e-4
set_epochs(train, lr_multiplier, epochs=16, drops=[8])
train.init_checkpoint = "models/co_dino_5scale_swin_large_22e_o365.pth"
train.init_checkpoint_mismatch = "reset"
train.output_dir = "output/co_dino_swin_l_o365_16ep"
