"""Encoders and decoders of DETRs that attend densely to one map of stride 32 ("C5")."""

from co_detr.modeling.single_scale.decoder import ConditionalDecoder, DABDecoder
from co_detr.modeling.single_scale.encoder import TransformerEncoder

__all__ = ["ConditionalDecoder", "DABDecoder", "TransformerEncoder"]
