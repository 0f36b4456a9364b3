"""Query sources: each makes query groups for the decoder."""

from co_detr.modeling.queries.anchors import AnchorQueries, PointQueries
from co_detr.modeling.queries.denoising import DenoisingQueries
from co_detr.modeling.queries.hybrid_matching import HybridMatchingQueries
from co_detr.modeling.queries.learned import LearnedQueries
from co_detr.modeling.queries.positive import PositiveQueries
from co_detr.modeling.queries.source import QuerySource
from co_detr.modeling.queries.two_stage import TwoStageQueries

__all__ = [
    "AnchorQueries",
    "DenoisingQueries",
    "HybridMatchingQueries",
    "LearnedQueries",
    "PointQueries",
    "PositiveQueries",
    "QuerySource",
    "TwoStageQueries",
]
