"""Co-DINO, ViT-L (EVA-02), from Objects365 to COCO, 12 epochs.

The official file names no checkpoint and no total batch: give the reference's Objects365 weights
with `train.init_checkpoint`. It also averages the weights over iterations (rate 1e-4), which is
not done here.
"""

from detectron2.config import LazyCall as L

from co_detr.modeling.backbones.vit import LayerDecay

from ..common.high_resolution import use_high_resolution
from ..common.schedule import set_epochs, warmed_up
from ..models.backbones import mapped_vit_l
from .co_dino_r50 import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone = mapped_vit_l
model.encoder.activation_checkpointing = True
model.queries.matching.num_queries = 1500
model.queries.denoising.update(num_queries=300, box_noise=0.4)
model.postprocessor.max_detections = 1000
roi_heads = model.auxiliary.roi.roi_heads
roi_heads.box_head.update(conv_dims=[256] * 4, conv_norm="GN", fc_dims=[1024])
roi_heads.box_predictor.cls_agnostic_bbox_reg = True
roi_heads.box_predictor.input_shape.channels = "${...box_head.fc_dims.0}"
roi_heads.box_predictor.box2box_transform.weights = (20.0, 20.0, 10.0, 10.0)

use_high_resolution(dataloader, max_size=2400)
optimizer.update(lr=5e-5, weight_decay=0.01)
optimizer.params.update(
    weight_decay_norm=0.0,
    weight_decay_bias=0.0,
    lr_factor_func=L(LayerDecay)(decay_rate=0.8, num_layers=24),
)
set_epochs(train, lr_multiplier, epochs=12, drops=[7])
lr_multiplier = warmed_up(lr_multiplier)
train.init_checkpoint = ""
train.init_checkpoint_mismatch = "reset"
train.output_dir = "output/co_dino_vit_l_o365_12ep"
