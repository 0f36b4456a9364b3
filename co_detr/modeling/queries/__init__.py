"""Query sources: each makes query groups for the decoder."""

from co_detr.modeling.queries.denoising import DenoisingQueries
from co_detr.modeling.queries.positive import PositiveQueries
from co_detr.modeling.queries.sources import (
    AnchorQueries,
    HybridMatchingQueries,
    LearnedQueries,
    PointQueries,
    QuerySource,
    QuerySources,
    TwoStageQueries,
)

__all__ = [
    "AnchorQueries",
    "DenoisingQueries",
    "HybridMatchingQueries",
    "LearnedQueries",
    "PointQueries",
    "PositiveQueries",
    "QuerySource",
    "QuerySources",
    "TwoStageQueries",
]
