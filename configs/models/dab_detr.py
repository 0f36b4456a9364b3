"""DAB-DETR-C5, and its auxiliary part; see `conditional_detr.py`."""

from detectron2.config import LazyCall as L
from torch import nn

from co_detr.modeling.queries import AnchorQueries
from co_detr.modeling.single_scale import DABDecoder

from .conditional_detr import auxiliary, model

model.encoder.position_encoding.temperature = 20.0
model.encoder.update(dropout=0.0, activation=nn.PReLU, scale_position=True)
model.decoder.update(_target_=DABDecoder, eps=1e-3)
model.queries.matching._target_ = AnchorQueries
model.criterion.class_weight = 1.0  # in the loss; in the matching cost it stays 2
model.postprocessor.max_detections = 300

# The decoder derives positions from the boxes.
auxiliary.positive_queries.with_position = False
