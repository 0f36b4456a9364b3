"""A small Co-DETR that learns the generated digits set from scratch in minutes on two CPU cores.

The parts of `co_detr_r50.py` at the size of `models/small.py`.
"""

from .co_detr_r50 import data, dataloader, lr_multiplier, model, optimizer, train
from .models.small import make_small

data.train = "datasets/digits/train.json"
data.train_images = "datasets/digits/train"
data.val = "datasets/digits/val.json"
data.val_images = "datasets/digits/val"

model.num_classes = 10
model.compare_detectors = True  # every evaluation reports all detectors of the model
make_small(model)

sizes = (144, 160, 176, 192)
dataloader.train.mapper.augmentations.update(
    short_edges=sizes,
    max_size=256,
    crop_probability=0.0,
    flip_probability=0.0,  # a mirrored digit is no digit
)
dataloader.test.mapper.augmentations.update(short_edge=168, max_size=256)
train.effective_batch_size = 8
dataloader.train.num_workers = 0  # two cores: a worker would take one from the model
dataloader.test.num_workers = 0

optimizer.lr = 4e-4
optimizer.params.lr_factor_func.update(prefixes=[], parts=["sampling_offsets"])
lr_multiplier.drops = [0.85]
train.init_checkpoint = ""
train.max_iter = 1000
train.eval_period = 250
train.log_period = 50
train.checkpointer.update(period=500, max_to_keep=2)
train.output_dir = "output/quickstart"
