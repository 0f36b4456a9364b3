"""Co-DINO, Swin-L, on LVIS, large-scale jitter, 36 epochs.

For testing, as the official file: that one leaves the schedule at 12 epochs. Here it is the one of
the other recipes of 36 epochs, which is what the reference reports for its weights.
"""

from ..common.lsj import use_lsj
from ..common.lvis import NUM_CLASSES, data, dataloader
from ..common.schedule import LVIS, set_epochs
from .co_dino_swin_l_12ep import lr_multiplier, model, optimizer, train

model.num_classes = NUM_CLASSES
use_lsj(model, dataloader, size=1280)
set_epochs(train, lr_multiplier, epochs=36, drops=[30], iterations=LVIS)
train.output_dir = "output/co_dino_swin_l_lsj_lvis_36ep"
