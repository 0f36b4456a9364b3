"""Co-Deformable-DETR for small data sets on modest machines: thin ResNet-50, short edge 256.

Half the backbone's width, width 128, three encoder and three decoder layers. Set data.* and
model.num_classes for your data, train.init_checkpoint for a pretrained backbone, and
model.auxiliary=null for the same model without its auxiliary part.
"""

from detectron2.config import LazyCall as L

from co_detr.modeling.postprocess import SoftNMSPostprocessor

from ..co_detr_r50 import data, dataloader, lr_multiplier, model, optimizer, train
from ..models.thin_resnet50 import mapped_thin_resnet50, pixel_mean, pixel_std

data.image_format = "BGR"
model.backbone = mapped_thin_resnet50
model.pixel_mean = pixel_mean
model.pixel_std = pixel_std
model.encoder.update(embed_dim=128, num_layers=3, feedforward_dim=512, strides=[8, 16, 32, 64])
model.decoder.num_layers = 3
model.queries.matching.num_queries = 100
# Worth five points of AP after a thousand steps, see docs/results.md.
model.postprocessor = L(SoftNMSPostprocessor)(max_detections=100, iou_threshold=0.6)
model.compare_detectors = True  # every evaluation reports all detectors of the model
model.auxiliary.positive_queries.max_queries = 100
model.auxiliary.roi.rpn.pre_nms_topk = (1000, 500)
model.auxiliary.roi.rpn.post_nms_topk = (500, 300)
model.auxiliary.roi.roi_heads.batch_size_per_image = 128
model.auxiliary.roi.roi_heads.box_head.fc_dims = [256, 256]

augmentation = dataloader.train.mapper.augmentations
augmentation.update(
    short_edges=[224, 240, 256, 272, 288],
    max_size=448,
    crop_short_edges=[288, 352],
    crop_size=[192, 288],
)
dataloader.test.mapper.augmentations.update(short_edge=256, max_size=448)
train.effective_batch_size = 4
dataloader.train.num_workers = 1
dataloader.test.num_workers = 1

train.init_checkpoint = ""
train.max_iter = 1000
train.eval_period = 250
train.log_period = 50
train.checkpointer.update(period=250, max_to_keep=2)
train.output_dir = "output/co_detr_thin_r50"
