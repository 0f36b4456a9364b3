"""The quick start with a small Co-DINO: denoising queries, quality focal loss, Soft-NMS."""

from .models.co_dino import auxiliary, model
from .models.small import make_small
from .quickstart import data, dataloader, lr_multiplier, optimizer, train

model.auxiliary = auxiliary
model.num_classes = 10
model.compare_detectors = True
make_small(model)
model.queries.denoising.num_queries = 30
model.postprocessor.max_detections = 100
train.output_dir = "output/quickstart_co_dino"
