"""Query sources: each makes one ``QueryGroup`` for the decoder."""

from co_detr.modeling.queries.denoising import DenoisingQueries
from co_detr.modeling.queries.positive import PositiveQueries
from co_detr.modeling.queries.two_stage import TwoStageQueries

__all__ = ["DenoisingQueries", "PositiveQueries", "TwoStageQueries"]
