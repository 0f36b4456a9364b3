"""Implementations of multi-scale deformable attention, as far as they are installed.

Every contestant takes :class:`Inputs` and returns ``(B, Q, H * D)`` in the dtype of the value,
differentiable by the leaves. Casts that an implementation needs are part of its time.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from co_detr.layers import ms_deform_attn, ms_deform_attn_reference
from co_detr.layers.deformable_attention import KERNEL_DEVICES

from .cases import Inputs

Attention = Callable[[Inputs], Tensor]
OURS, EAGER, COMPILED = "ours", "reference eager", "reference compiled"
ORIGINAL = "MultiScaleDeformableAttention"
IM2COL_STEP = 64


@dataclass(frozen=True)
class Field:
    """Who takes part, and why the others do not."""

    present: dict[str, Attention] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def find_contestants(device: str, wanted: list[str] | None = None) -> Field:
    """Everything that can be imported and has kernels for ``device``, or what was ``wanted``.

    Raises:
        ValueError: a name in ``wanted`` is none of them.
    """
    makers = {
        OURS: _ours,
        EAGER: lambda device: _eager,
        COMPILED: lambda device: _compiled(),
        ORIGINAL: _original,
        "mmcv": _mmcv,
        "deformops": _deformops,
        "msda_triton": _msda_triton,
    }
    unknown = sorted(set(wanted or ()) - makers.keys())
    if unknown:
        raise ValueError(f"no such contestants: {unknown}; there are {list(makers)}")
    found = Field()
    for name, maker in makers.items():
        if wanted is not None and name not in wanted:
            continue
        try:
            found.present[name] = maker(device)
        except (ImportError, Unavailable) as error:
            found.absent[name] = str(error)
    return found


class Unavailable(Exception):
    """An implementation is installed, but not for this device."""


def _ours(device: str) -> Attention:
    if device not in KERNEL_DEVICES:
        raise Unavailable(f"co_detr was installed without a kernel for {device}")
    return lambda inputs: ms_deform_attn(
        inputs.value, inputs.level_shapes, inputs.locations, inputs.weights
    )


def _eager(inputs: Inputs) -> Tensor:
    return ms_deform_attn_reference(
        inputs.value, inputs.level_shapes, inputs.locations, inputs.weights
    )


def _compiled() -> Attention:
    compiled = torch.compile(ms_deform_attn_reference, dynamic=False, fullgraph=True)
    return lambda inputs: compiled(
        inputs.value, inputs.level_shapes, inputs.locations, inputs.weights
    )


def _original(device: str) -> Attention:
    import MultiScaleDeformableAttention as kernels

    if device != "cuda":
        raise Unavailable("has no CPU kernel")
    return functools.partial(_call_original, _original_function(kernels))


def _original_function(kernels: ModuleType) -> Callable[..., Tensor]:
    """The original kernels behind autograd, in the way all of their users do it."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, shapes, starts, locations, weights):
            ctx.save_for_backward(value, shapes, starts, locations, weights)
            return kernels.ms_deform_attn_forward(
                value, shapes, starts, locations, weights, IM2COL_STEP
            )

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad_output):
            grad_value, grad_locations, grad_weights = kernels.ms_deform_attn_backward(
                *ctx.saved_tensors, grad_output.contiguous(), IM2COL_STEP
            )
            return grad_value, None, None, grad_locations, grad_weights

    return Function.apply


def _call_original(function: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    output = function(  # knows fp32 only
        inputs.value.float(),
        inputs.shapes_tensor,
        inputs.level_starts,
        inputs.locations,
        inputs.weights,
    )
    return output.to(inputs.value.dtype)


def _mmcv(device: str) -> Attention:
    from mmcv.ops import multi_scale_deform_attn as module

    if device == "cuda":
        function = module.MultiScaleDeformableAttnFunction.apply
        return functools.partial(  # bf16 is not among its kernels
            _call_original, lambda *arguments: function(*arguments, IM2COL_STEP)
        )
    return lambda inputs: module.multi_scale_deformable_attn_pytorch(
        inputs.value.float(), inputs.shapes_tensor, inputs.locations, inputs.weights
    ).to(inputs.value.dtype)


def _deformops(device: str) -> Attention:
    from deformops.registry import msda

    return lambda inputs: msda(  # its weights have the dtype of the value
        inputs.value,
        inputs.shapes_tensor,
        inputs.level_starts,
        inputs.locations,
        inputs.weights.to(inputs.value.dtype),
    )


def _msda_triton(device: str) -> Attention:
    if device != "cuda":
        raise Unavailable("has no CPU kernel")
    # Not its public function, which falls back to grid_sample without a word on any error.
    try:
        from msda_triton.frontend import triton_multiscale_deformable_attention as function
    except ImportError:
        from msda_triton.autograd_function import triton_multiscale_deformable_attention as function

    def attend(inputs: Inputs) -> Tensor:
        output = function(  # knows no bf16
            inputs.value.float(),
            inputs.shapes_tensor,
            inputs.locations,
            inputs.weights,
            "zeros",
            False,
        )
        return output.flatten(2).to(inputs.value.dtype)

    return attend
