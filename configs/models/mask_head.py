"""The mask head of Co-DINO-Inst, for ``model.mask_head``; the interpolations reach that model.

It reads five levels from stride 4 (Co-DINO); Co-Deformable-DETR has four from stride 8. The data
need masks, which a config with a mask head reads by itself (common/coco.py).
"""

from detectron2.config import LazyCall as L

from co_detr.modeling.mask_losses import MaskCriterion, RegionSampler
from co_detr.modeling.masks import MaskIoUHead, RefineMaskHead

mask_head = L(RefineMaskHead)(
    num_classes="${..num_classes}",
    embed_dim="${..encoder.embed_dim}",
    strides=[4, 8, 16, 32, 64],
    num_decoder_layers="${..decoder.num_layers}",
    lambda_2=2.0,
    width=None,  # that of the encoder
    chunk_size=32,
    sampler=L(RegionSampler)(
        num_proposals="${...postprocessor.max_detections}",
        max_positives=128,
        iou_threshold=0.5,
    ),
    criterion=L(MaskCriterion)(
        loss_weight=1.33,
        stage_weights=[0.5, 0.75, 0.75, 1.0],
        boundary_width=2,
    ),
    iou_head=L(MaskIoUHead)(
        num_classes="${..num_classes}",
        embed_dim="${..embed_dim}",
        conv_dim=256,
        fc_dim=1024,
        loss_weight=0.5,
    ),
)
