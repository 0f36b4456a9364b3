"""Co-DINO, ResNet-50, on LVIS, 12 epochs.

For testing: the reference publishes neither weights nor results, and its file does not train as it
is (its augmentation does not reach the data set inside the class-balanced one).
"""

from ..common.lvis import NUM_CLASSES, data, dataloader
from ..common.schedule import LVIS, set_epochs
from .co_dino_r50 import lr_multiplier, model, optimizer, train

model.num_classes = NUM_CLASSES
dataloader.train.dataset.repeat_threshold = 1e-3
set_epochs(train, lr_multiplier, epochs=12, drops=[11], iterations=LVIS)
train.output_dir = "output/co_dino_r50_lvis_12ep"
