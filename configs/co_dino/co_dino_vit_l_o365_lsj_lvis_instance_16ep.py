"""Co-DINO-Inst on LVIS: boxes and masks, ViT-L (EVA-02), large-scale jitter, 16 epochs.

For testing, as the reference calls its file, and as the model without masks.
"""

from ..models.mask_head import mask_head
from .co_dino_vit_l_o365_lsj_lvis_16ep import (
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.mask_head = mask_head
model.mask_head.criterion.loss_weight = 1.0
train.output_dir = "output/co_dino_vit_l_o365_lsj_lvis_instance_16ep"
