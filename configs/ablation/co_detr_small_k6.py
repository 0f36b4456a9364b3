"""`co_detr_small.py` with all auxiliary heads (K = 6)."""

from ..quickstart_k6 import model
from ..small.co_detr_small import data, dataloader, lr_multiplier, optimizer, train

model.queries.matching.num_queries = 150
train.output_dir = "output/co_detr_small_k6"
