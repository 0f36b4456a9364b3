"""A small Co-DETR that learns the generated digits set from scratch in minutes on two CPU cores.

The parts of `co_detr_r50.py` at the size of `models/small.py`.
"""

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import CosineParamScheduler

from .co_detr_r50 import data, dataloader, model, optimizer, train
from .common.schedule import warmed_up
from .models.small import make_quick_to_learn, make_small

data.train = "datasets/digits/train.json"
data.train_images = "datasets/digits/train"
data.val = "datasets/digits/val.json"
data.val_images = "datasets/digits/val"

model.num_classes = 10
model.compare_detectors = True  # every evaluation reports all detectors of the model
make_small(model)
make_quick_to_learn(model)

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

# From scratch, all parts learn at one rate, ten times that of the recipe: at a tenth of it the
# sampling offsets would hardly leave their first places in a thousand steps.
optimizer.lr = 2e-3
optimizer.params.lr_factor_func.update(prefixes=[], parts=[])
lr_multiplier = warmed_up(
    L(CosineParamScheduler)(start_value=1.0, end_value=0.01), iterations=100, factor=0.05
)
train.ema.update(enabled=True, decay=0.99, warmup_iterations=100)
train.init_checkpoint = ""
train.max_iter = 700
train.eval_period = 175
train.log_period = 50
train.checkpointer.update(period=350, max_to_keep=2)
train.output_dir = "output/quickstart"
