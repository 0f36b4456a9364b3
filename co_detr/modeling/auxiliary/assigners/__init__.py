"""Assignment of ground truths to dense anchors.

An assigner takes the anchors of one image, ``(R_l, 4)`` absolute xyxy per level, and its ground
truths ``(G, 4)``. It gives ``(R,)`` int64: the index of the ground truth, or BACKGROUND or IGNORED.
"""

from co_detr.modeling.auxiliary.assigners.atss import ATSSAssigner
from co_detr.modeling.auxiliary.assigners.centre_sampling import CentreSamplingAssigner
from co_detr.modeling.auxiliary.assigners.labels import BACKGROUND, IGNORED
from co_detr.modeling.auxiliary.assigners.max_iou import MaxIoUAssigner
from co_detr.modeling.auxiliary.assigners.paa import PAAAssigner

__all__ = [
    "BACKGROUND",
    "IGNORED",
    "ATSSAssigner",
    "CentreSamplingAssigner",
    "MaxIoUAssigner",
    "PAAAssigner",
]
