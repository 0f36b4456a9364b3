"""One-to-many heads that supervise the encoder, and can be asked to detect at test time."""

from co_detr.modeling.auxiliary.assigners import (
    ATSSAssigner,
    CentreSamplingAssigner,
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
    CentrenessCriterion,
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

__all__ = [
    "ATSSAssigner",
    "ATSSHead",
    "AuxiliaryBranch",
    "CentreSamplingAssigner",
    "CentrenessCriterion",
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
