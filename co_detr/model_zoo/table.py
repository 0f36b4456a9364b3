"""The table of models: one `ZooEntry` per file in ``configs``."""

from __future__ import annotations

from co_detr.model_zoo.entry import ZooEntry
from co_detr.model_zoo.released import RELEASED

_OUR_OWN = (
    ZooEntry("co_detr_r50_atss", "Co-Deformable-DETR, ResNet-50, ATSS head alone, 12 epochs"),
    ZooEntry("co_detr_r50_k6", "Co-Deformable-DETR, ResNet-50, six auxiliary heads, 12 epochs"),
    ZooEntry("co_detr_r50_mask_rcnn", "Co-Deformable-DETR, ResNet-50, Mask R-CNN head, 12 epochs"),
    ZooEntry("deformable_detr_r50", "Deformable-DETR++, ResNet-50, no auxiliary heads, 12 epochs"),
    ZooEntry(
        "co_conditional_detr_r50", "Co-Conditional-DETR-C5, ResNet-50, ROI and ATSS, 50 epochs"
    ),
    ZooEntry("co_dab_detr_r50", "Co-DAB-DETR-C5, ResNet-50, ROI and ATSS heads, 50 epochs"),
    ZooEntry(
        "conditional_detr_r50", "Conditional-DETR-C5, ResNet-50, no auxiliary heads, 50 epochs"
    ),
    ZooEntry("dab_detr_r50", "DAB-DETR-C5, ResNet-50, no auxiliary heads, 50 epochs"),
    ZooEntry("co_detr_small", "small Co-Deformable-DETR for your own data on a CPU, from scratch"),
    ZooEntry("co_detr_thin_r50", "small Co-Deformable-DETR for small data sets, thin ResNet-50"),
    ZooEntry(
        "quickstart", "small Co-Deformable-DETR for the digits, from scratch", dataset="digits"
    ),
    ZooEntry(
        "quickstart_k6", "small Co-Deformable-DETR with six auxiliary heads", dataset="digits"
    ),
    ZooEntry("quickstart_co_dino", "small Co-DINO for the digits, from scratch", dataset="digits"),
)

ZOO: dict[str, ZooEntry] = {entry.name: entry for entry in (*RELEASED, *_OUR_OWN)}

__all__ = ["ZOO", "ZooEntry"]
