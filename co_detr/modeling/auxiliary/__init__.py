"""One-to-many heads that supervise the encoder, and can be asked to detect at test time."""

from typing import Any

from co_detr.modeling.auxiliary.assigners import (
    ATSSAssigner,
    CenterSamplingAssigner,
    MaxIoUAssigner,
    PAAAssigner,
)
from co_detr.modeling.auxiliary.branch import (
    AuxiliaryBranch,
    ExtraLevel,
    HybridAssignmentHeads,
    SimplePyramid,
)
from co_detr.modeling.auxiliary.dense_head import DenseHead
from co_detr.modeling.auxiliary.dense_losses import (
    CenternessCriterion,
    DeltaCode,
    DensePredictions,
    DistanceCode,
    DistributionCode,
    DistributionCriterion,
    IoUCriterion,
    SmoothL1Criterion,
)
from co_detr.modeling.auxiliary.dense_networks import (
    ATSSHead,
    FCOSHead,
    PAAHead,
    RetinaNetHead,
    TowerHead,
    flatten_map,
)
from co_detr.modeling.auxiliary.faster_rcnn import (
    CollaborativeROIHeads,
    CollaborativeRPN,
    FasterRCNNHead,
)
from co_detr.moved import renamed_member

__all__ = [
    "ATSSAssigner",
    "ATSSHead",
    "AuxiliaryBranch",
    "CenterSamplingAssigner",
    "CenternessCriterion",
    "CollaborativeROIHeads",
    "CollaborativeRPN",
    "DeltaCode",
    "DenseHead",
    "DensePredictions",
    "DistanceCode",
    "DistributionCode",
    "DistributionCriterion",
    "ExtraLevel",
    "FCOSHead",
    "FasterRCNNHead",
    "HybridAssignmentHeads",
    "IoUCriterion",
    "MaxIoUAssigner",
    "PAAAssigner",
    "PAAHead",
    "RetinaNetHead",
    "SimplePyramid",
    "SmoothL1Criterion",
    "TowerHead",
    "flatten_map",
]


def __getattr__(name: str) -> Any:
    """Classes by the names that they had in an earlier version, for configs in Python."""
    return renamed_member(__name__, globals(), name)
