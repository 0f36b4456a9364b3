"""Layers with kernels of their own."""

from .deformable_attention import (
    MultiScaleDeformableAttention,
    ms_deform_attn,
    ms_deform_attn_reference,
)

__all__ = ["MultiScaleDeformableAttention", "ms_deform_attn", "ms_deform_attn_reference"]
