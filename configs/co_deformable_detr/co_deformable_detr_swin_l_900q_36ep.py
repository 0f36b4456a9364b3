"""Co-Deformable-DETR, Swin-L, 900 queries, 36 epochs."""

from ..common.schedule import set_epochs
from .co_deformable_detr_swin_l_12ep import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.drop_path_rate = 0.6
model.queries.matching.num_queries = 900
model.postprocessor.max_detections = 300
set_epochs(train, lr_multiplier, epochs=36, drops=[30])
train.output_dir = "output/co_deformable_detr_swin_l_900q_36ep"
