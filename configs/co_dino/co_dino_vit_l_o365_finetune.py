"""Co-DINO, ViT-L (EVA-02), from the reference's Objects365 weights to data of your own.

The weights are fetched from the hub (2.8 GB); what does not fit your classes is initialized anew.
No recipe of the reference, but that for COCO with images of half the size and 4 of them in a step,
for which the rate is halved. `--dry-run` tells what fits a card.
"""

from ..common.schedule import warmed_up
from .co_dino_r50 import lr_multiplier
from .co_dino_vit_l_o365_12ep import data, dataloader, model, optimizer, train

dataloader.train.mapper.augmentations.update(short_edges=list(range(480, 801, 32)), max_size=1333)
dataloader.test.mapper.augmentations.update(short_edge=800, max_size=1333)
train.effective_batch_size = 4
train.images_per_gpu = 1
train.amp.enabled = True
optimizer.lr = 2.5e-5
train.max_iter = 20000
train.eval_period = 1000
lr_multiplier.drops = [0.8]
lr_multiplier = warmed_up(lr_multiplier)
train.ema.decay = 0.999  # of a short training
train.init_checkpoint = "hf://zongzhuofan/co-detr-vit-large-objects365/pytorch_model.pth"
train.output_dir = "output/co_dino_vit_l_o365_finetune"
