"""One-to-many heads that supervise the encoder; none of this runs at test time."""

from co_detr.modeling.auxiliary.assigners import ATSSAssigner
from co_detr.modeling.auxiliary.atss import ATSSHead
from co_detr.modeling.auxiliary.faster_rcnn import (
    CollaborativeROIHeads,
    CollaborativeRPN,
    FasterRCNNHead,
)
from co_detr.modeling.auxiliary.hybrid import AuxiliaryBranch, HybridAssignmentHeads
from co_detr.modeling.auxiliary.pyramid import ExtraLevel

__all__ = [
    "ATSSAssigner",
    "ATSSHead",
    "AuxiliaryBranch",
    "CollaborativeROIHeads",
    "CollaborativeRPN",
    "ExtraLevel",
    "FasterRCNNHead",
    "HybridAssignmentHeads",
]
