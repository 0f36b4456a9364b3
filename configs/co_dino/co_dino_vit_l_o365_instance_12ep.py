"""Co-DINO-Inst: boxes and masks, ViT-L (EVA-02), from Objects365 to COCO, 12 epochs.

As the model without masks, from whose weights it may start as well; losses of masks weigh 15.96.
"""

from ..models.mask_head import mask_head
from .co_dino_vit_l_o365_12ep import data, dataloader, lr_multiplier, model, optimizer, train

model.mask_head = mask_head
train.output_dir = "output/co_dino_vit_l_o365_instance_12ep"
