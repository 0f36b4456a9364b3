"""Co-DINO, ResNet-50, on LVIS, large-scale jitter, 12 epochs.

For testing: the reference publishes neither weights nor results.
"""

from ..common.lsj import use_lsj
from ..common.lvis import NUM_CLASSES, data, dataloader
from ..common.schedule import LVIS, set_epochs
from .co_dino_r50 import lr_multiplier, model, optimizer, train

model.num_classes = NUM_CLASSES
use_lsj(model, dataloader, size=1024)
set_epochs(train, lr_multiplier, epochs=12, drops=[11], iterations=LVIS)
train.output_dir = "output/co_dino_r50_lsj_lvis_12ep"
