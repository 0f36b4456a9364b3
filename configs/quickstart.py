"""A small Co-DETR that learns the generated digits set from scratch in minutes on two CPU cores.

Same parts as `co_detr_r50.py`, but a thin ResNet-18 trained from scratch (group norm, nothing
frozen), three levels, width 96, two encoder and three decoder layers.
"""

from detectron2.config import LazyCall as L

from co_detr.modeling.resnet import resnet_stages

from .co_detr_r50 import data, dataloader, lr_multiplier, model, optimizer, train

data.train = "datasets/digits/train.json"
data.train_images = "datasets/digits/train"
data.val = "datasets/digits/val.json"
data.val_images = "datasets/digits/val"

model.num_classes = 10
bottom_up = model.backbone.bottom_up
bottom_up.stem.update(out_channels=32, norm="GN")
bottom_up.stages = L(resnet_stages)(depth=18, stem_channels=32, res2_channels=32, norm="GN")
bottom_up.freeze_at = 0
bottom_up.out_features = ["res3", "res4", "res5"]
model.backbone.num_extra_levels = 0
model.backbone.num_groups = 16

model.encoder.update(embed_dim=96, num_heads=4, num_levels=3, num_layers=2, feedforward_dim=256)
model.decoder.num_layers = 3
model.queries[0].num_queries = 60

auxiliary = model.auxiliary
levels = ["p3", "p4", "p5", "p6"]  # three of the encoder and the extra one
auxiliary.pyramid.num_groups = 16
auxiliary.positive_queries.max_queries = 60
auxiliary.atss.update(in_features=levels, strides=[8, 16, 32, 64], anchor_scale=4.0, num_groups=16)
rpn, roi_heads = auxiliary.roi.rpn, auxiliary.roi.roi_heads
rpn.in_features = levels
# Digits are 24 to 64 pixels: anchors at half the usual scale.
rpn.anchor_generator.sizes = [[16 * 2**i * 2 ** (j / 3) for j in range(3)] for i in range(4)]
rpn.anchor_generator.strides = [8, 16, 32, 64]
rpn.pre_nms_topk = (500, 500)
rpn.post_nms_topk = (200, 100)
roi_heads.batch_size_per_image = 64
roi_heads.box_in_features = levels[:3]
roi_heads.box_pooler.scales = (1 / 8, 1 / 16, 1 / 32)
roi_heads.box_head.fc_dims = [192, 192]

sizes = (144, 160, 176, 192)
dataloader.train.mapper.augmentations.update(
    short_edges=sizes,
    max_size=256,
    crop_probability=0.0,
    flip_probability=0.0,  # a mirrored digit is no digit
)
dataloader.test.mapper.augmentations.update(short_edge=168, max_size=256)
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 0  # two cores: a worker would take one from the model
dataloader.test.num_workers = 0

optimizer.lr = 4e-4
optimizer.params.lr_factor_func.update(prefixes=[], parts=["sampling_offsets"])
lr_multiplier.drops = [0.85]
train.init_checkpoint = ""
train.max_iter = 1000
train.eval_period = 250
train.log_period = 50
train.checkpointer.update(period=500, max_to_keep=2)
train.output_dir = "output/quickstart"
