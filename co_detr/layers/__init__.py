"""Layers with kernels of their own."""

from .ms_deform_attn import MultiScaleDeformableAttention
from .ms_deform_attn_op import ms_deform_attn
from .ms_deform_attn_reference import ms_deform_attn_reference

__all__ = ["MultiScaleDeformableAttention", "ms_deform_attn", "ms_deform_attn_reference"]
