"""Co-DINO, ViT-L (EVA-02), from Objects365 to COCO, 12 epochs.

The official file names no checkpoint and no total batch: give the reference's Objects365 weights
with `train.init_checkpoint`.
"""

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
optimizer.params.update(weight_decay_norm=0.0, weight_decay_bias=0.0)
optimizer.params.lr_factor_func.update(
    factor=1.0, layer_decay=0.8, depths="${model.backbone.bottom_up.depth}"
)
train.ema.update(enabled=True, decay=0.9999, warmup_iterations=2000)  # ExpMomentumEMAHook(1e-4)
set_epochs(train, lr_multiplier, epochs=12, drops=[7])
lr_multiplier = warmed_up(lr_multiplier)
train.init_checkpoint = ""
train.init_checkpoint_mismatch = "reset"
train.output_dir = "output/co_dino_vit_l_o365_12ep"
