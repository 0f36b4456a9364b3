"""Co-DINO, Swin-L, 12 epochs."""

from ..common.pretrained import SWIN_L
from ..models.backbones import mapped_swin_l
from .co_dino_r50 import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone = mapped_swin_l
model.backbone.bottom_up.out_features = ["stage0", "stage1", "stage2", "stage3"]
model.encoder.activation_checkpointing = True
train.init_checkpoint = SWIN_L
train.output_dir = "output/co_dino_swin_l_12ep"
