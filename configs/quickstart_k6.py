"""`quickstart.py` with all auxiliary heads (K = 6)."""

from .co_deformable_detr.co_detr_r50_k6 import model
from .models.small import make_quick_to_learn, make_small
from .quickstart import data, dataloader, lr_multiplier, optimizer, train

model.num_classes = 10
model.compare_detectors = True
make_small(model)
make_quick_to_learn(model)
train.output_dir = "output/quickstart_k6"
