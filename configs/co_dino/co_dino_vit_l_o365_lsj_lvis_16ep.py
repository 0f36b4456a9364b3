"""Co-DINO, ViT-L (EVA-02), from Objects365 to LVIS, large-scale jitter, 16 epochs.

For testing, as the reference calls its file: that one names no checkpoint and no total batch, does
not clip gradients, and slows the whole backbone down in place of the layer-wise rates that it says
were used.
"""

from ..common.lsj import use_lsj
from ..common.lvis import NUM_CLASSES, data, dataloader
from ..common.schedule import LVIS, set_epochs, warmed_up
from ..models.backbones import mapped_vit_l_lsj
from .co_dino_r50 import lr_multiplier, model, optimizer, train

model.num_classes = NUM_CLASSES
model.backbone = mapped_vit_l_lsj
model.encoder.activation_checkpointing = True
model.queries.denoising.update(num_queries=300, box_noise=0.4)
model.postprocessor.max_detections = 1000
use_lsj(model, dataloader, size=1536)
model.backbone.bottom_up.square_size = "${...padding.square_size}"

optimizer.update(lr=5e-5, weight_decay=0.05)
set_epochs(train, lr_multiplier, epochs=16, drops=[9, 15], iterations=LVIS)
lr_multiplier = warmed_up(lr_multiplier)
train.clip_grad.max_norm = None
train.init_checkpoint = ""
train.init_checkpoint_mismatch = "reset"
train.output_dir = "output/co_dino_vit_l_o365_lsj_lvis_16ep"
