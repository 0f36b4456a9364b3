"""The common configs around the tiny detector."""

from detectron2.config import LazyCall as L

from tests.engine.tiny_detector import TinyDetector

from ...configs.common.coco import data, dataloader  # noqa: F401
from ...configs.common.optim import AdamW as optimizer
from ...configs.common.schedule import lr_multiplier  # noqa: F401
from ...configs.common.train import train

model = L(TinyDetector)(num_classes=2)
dataloader.train.num_workers = 0
dataloader.train.mapper.augmentations.short_edges = [48, 56, 64]
dataloader.train.mapper.augmentations.crop_short_edges = [56, 72]
dataloader.train.mapper.augmentations.crop_size = [32, 48]
dataloader.test.num_workers = 0
dataloader.test.mapper.augmentations.short_edge = 48
optimizer.lr = 1e-2
optimizer.params.lr_factor_func.prefixes = ["backbone."]
train.device = "cpu"
train.effective_batch_size = 4
train.max_iter = 6
train.log_period = 1
train.eval_period = 0
train.checkpointer.period = 3
