"""Co-Deformable-DETR, ResNet-50, with all auxiliary heads (K = 6), 12 epochs."""

from ..co_detr_r50 import data, dataloader, lr_multiplier, model, optimizer, train
from ..models.auxiliary import fcos, gfl, paa, retinanet

model.auxiliary.update(retinanet=retinanet, fcos=fcos, paa=paa, gfl=gfl)
train.output_dir = "output/co_detr_r50_k6"
