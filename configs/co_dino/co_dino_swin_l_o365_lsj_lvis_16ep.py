"""Co-DINO, Swin-L, from Objects365 to LVIS, large-scale jitter, 16 epochs.

For testing, as the reference calls its file. Starts from the reference's Objects365 checkpoint,
whose class heads have 365 classes and so are initialized anew.
"""

from ..common.schedule import LVIS, set_epochs
from .co_dino_swin_l_lsj_lvis_36ep import data, dataloader, lr_multiplier, model, optimizer, train

model.queries.denoising.update(num_queries=500, box_noise=0.4)
model.postprocessor.max_detections = 1000
model.padding.square_size = 1536
optimizer.lr = 1e-4
set_epochs(train, lr_multiplier, epochs=16, drops=[8], iterations=LVIS)
train.init_checkpoint = "models/co_dino_5scale_swin_large_22e_o365.pth"
train.init_checkpoint_mismatch = "reset"
train.output_dir = "output/co_dino_swin_l_o365_lsj_lvis_16ep"
