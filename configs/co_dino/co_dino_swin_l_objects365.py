"""Co-DINO, Swin-L, on Objects365: the model of the checkpoint that fine-tuning starts from.

For testing: the reference publishes the weights (22 epochs) but no recipe, so that all settings of
training are just those of `co_dino_swin_l_o365_16ep.py`.
"""

from ..common.objects365 import NUM_CLASSES, data, dataloader
from .co_dino_swin_l_o365_16ep import lr_multiplier, model, optimizer, train

model.num_classes = NUM_CLASSES
train.init_checkpoint_mismatch = "error"
train.output_dir = "output/co_dino_swin_l_objects365"
