"""A small Co-DETR for your own data on a CPU: from scratch, short edge of about 192 pixels.

The model of `quickstart.py`. 1500 iterations take three quarters of an hour on two slow cores, a
third of that on two with AVX-512. With a GPU, or for objects that are tiny at this size, start from
`co_detr_r50.py` and its pretrained backbone.
"""

from ..quickstart import data, dataloader, lr_multiplier, model, optimizer, train

# Three for each object of a crowded image: 60 for 45 objects cost four points of AP, see
# docs/evidence.md. It takes a twentieth of a step.
model.queries.matching.num_queries = 150

dataloader.train.mapper.augmentations.update(
    short_edges=(160, 176, 192, 208),
    max_size=320,
    flip_probability=0.5,
    # Without crops a few hundred images are learned by heart, see docs/evidence.md.
    crop_probability=0.5,
    crop_short_edges=None,  # in the recipe's proportion to short_edges
    crop_size=None,
)
dataloader.test.mapper.augmentations.update(short_edge=192, max_size=320)
train.max_iter = 1500
train.eval_period = 250
train.output_dir = "output/co_detr_small"
