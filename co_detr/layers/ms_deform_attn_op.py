"""``ms_deform_attn``: validates, applies the autocast rule and picks the kernel.

The compiled extension defines ``torch.ops.co_detr.ms_deform_attn`` and its backward for CPU and,
when built with CUDA, for CUDA. This file adds what the dispatcher needs beside kernels: shape
inference, autograd formulas (twice differentiable) and the fall-back to the PyTorch reference.
"""

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .ms_deform_attn_reference import accumulation_dtype, ms_deform_attn_reference

HAS_EXTENSION = importlib.util.find_spec("co_detr._C") is not None
if HAS_EXTENSION:
    try:
        from co_detr import _C  # noqa: F401  (registers the kernels)
    except ImportError as error:
        raise ImportError(
            f"co_detr's kernels do not load into this PyTorch {torch.__version__} ({error}); build "
            "them again: pip install --no-build-isolation --no-deps -e ."
        ) from error

# Device types that the installed extension has kernels for; a subset of {"cpu", "cuda"}.
KERNEL_DEVICES = frozenset(
    key.lower()
    for key in ("CPU", "CUDA")
    if HAS_EXTENSION
    and torch._C._dispatch_has_kernel_for_dispatch_key("co_detr::ms_deform_attn", key)
)
VALUE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_standard_operators = False


def ms_deform_attn(
    value: Tensor,
    level_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention: weighted bilinear samples of all levels.

    Under autocast ``value`` takes the autocast dtype; locations, weights and sums are fp32 always
    (fp64 for an fp64 value). Points outside of a level, NaN and infinite ones included, contribute
    zero. The value itself is expected to be finite: a NaN pixel at the border of a level can reach
    queries that point outside of it.

    The CPU kernels give the same bits for any number of threads. On CUDA the gradient of the value
    differs in its last bits from run to run, because threads add to shared pixels in any order;
    under ``torch.use_deterministic_algorithms(True)`` (with ``warn_only`` too, and without a
    warning) it is gathered in a fixed order instead, which is slower and takes about 40 bytes for
    each of up to 2^22 points, or for each point of one head of one image where those are more. The
    gradient of the gradient uses ``grid_sample``, which PyTorch refuses on CUDA in that mode.

    Args:
        value: ``(B, S, H, D)`` in fp32, fp64, bf16 or fp16; levels concatenated along S.
        level_shapes: ``(height, width)`` of every level, Python integers, S pixels in all.
        sampling_locations: ``(B, Q, H, L, P, 2)`` as (x, y), in [0, 1] of each level.
        attention_weights: ``(B, Q, H, L, P)``.

    Returns:
        ``(B, Q, H * D)`` in the dtype of ``value``.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    check_arguments(value, level_shapes, sampling_locations, attention_weights)
    device_type = value.device.type
    if torch.is_autocast_enabled(device_type) and value.dtype != torch.float64:
        value = value.to(torch.get_autocast_dtype(device_type))
    dtype = accumulation_dtype(value.dtype)
    sampling_locations = sampling_locations.to(dtype)
    attention_weights = attention_weights.to(dtype)
    if _standard_operators or device_type not in KERNEL_DEVICES:
        if not (_standard_operators or torch.compiler.is_compiling()):
            _warn_about_fallback(device_type)
        return ms_deform_attn_reference(
            value, list(level_shapes), sampling_locations, attention_weights
        )
    flat_shapes = [size for shape in level_shapes for size in shape]
    return torch.ops.co_detr.ms_deform_attn(
        value, flat_shapes, sampling_locations, attention_weights
    )


@contextlib.contextmanager
def standard_operators() -> Iterator[None]:
    """Inside, the reference is used everywhere: for graphs that shall run without this package."""
    global _standard_operators
    before, _standard_operators = _standard_operators, True
    try:
        yield
    finally:
        _standard_operators = before


@functools.cache
def _warn_about_fallback(device_type: str) -> None:
    warnings.warn(
        f"co_detr has no compiled MSDeformAttn kernel for {device_type!r} and uses the slow "
        "PyTorch reference; install with `pip install --no-build-isolation -e .` to build it.",
        stacklevel=3,
    )


def check_arguments(
    value: Tensor,
    level_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> None:
    """Raise a ValueError naming the first argument that does not fit the others."""
    if value.dim() != 4:
        raise ValueError(f"value must have shape (B, S, H, D), got {tuple(value.shape)}.")
    if value.dtype not in VALUE_DTYPES:
        raise ValueError(f"value must be fp32, fp64, bf16 or fp16, got {value.dtype}.")
    if len(level_shapes) == 0:
        raise ValueError("level_shapes must name at least one level, got none.")
    for shape in level_shapes:
        if len(shape) != 2 or shape[0] < 1 or shape[1] < 1:
            raise ValueError(
                f"level_shapes must be pairs of positive (height, width), got {level_shapes}."
            )
    batch, pixels, heads, _ = value.shape
    described = sum(height * width for height, width in level_shapes)
    if described != pixels:
        raise ValueError(
            f"level_shapes {list(level_shapes)} describe {described} pixels, but value has "
            f"{pixels}: shape {tuple(value.shape)}."
        )
    locations_shape = tuple(sampling_locations.shape)
    expected = f"(B={batch}, Q, H={heads}, L={len(level_shapes)}, P, 2)"
    if (
        len(locations_shape) != 6
        or (locations_shape[0], *locations_shape[2:4]) != (batch, heads, len(level_shapes))
        or locations_shape[5] != 2
    ):
        raise ValueError(f"sampling_locations must have shape {expected}, got {locations_shape}.")
    if tuple(attention_weights.shape) != locations_shape[:5]:
        raise ValueError(
            f"attention_weights must have shape {locations_shape[:5]} like sampling_locations, "
            f"got {tuple(attention_weights.shape)}."
        )
    for name, tensor in (
        ("sampling_locations", sampling_locations),
        ("attention_weights", attention_weights),
    ):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}.")
        if tensor.device != value.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but value is on {value.device}: move it there."
            )


def _pairs(flat_shapes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(flat_shapes[::2], flat_shapes[1::2], strict=True))


def _fake_forward(value, level_shapes, sampling_locations, attention_weights):
    check_arguments(value, _pairs(level_shapes), sampling_locations, attention_weights)
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * channels)


def _fake_backward(grad_output, value, level_shapes, sampling_locations, attention_weights):
    return (
        torch.empty_like(value, memory_format=torch.contiguous_format),
        torch.empty_like(sampling_locations, memory_format=torch.contiguous_format),
        torch.empty_like(attention_weights, memory_format=torch.contiguous_format),
    )


def _save_forward(ctx, inputs, output):
    value, ctx.level_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _forward_gradient(ctx, grad_output):
    value, locations, weights = ctx.saved_tensors
    grads = torch.ops.co_detr.ms_deform_attn_backward(
        grad_output, value, ctx.level_shapes, locations, weights
    )
    return grads[0], None, grads[1], grads[2]


def _save_backward(ctx, inputs, output):
    grad_output, value, ctx.level_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(grad_output, value, sampling_locations, attention_weights)


def _backward_gradient(ctx, *output_grads):
    """Gradient of the gradient, by differentiating the reference twice."""
    with torch.enable_grad():
        inputs = [
            tensor if tensor.requires_grad else tensor.detach().requires_grad_()
            for tensor in ctx.saved_tensors
        ]
        grad_output, value, locations, weights = inputs
        output = ms_deform_attn_reference(value, _pairs(ctx.level_shapes), locations, weights)
        first = torch.autograd.grad(
            output, (value, locations, weights), grad_output, create_graph=True
        )
    second = torch.autograd.grad(
        first,
        inputs,
        [
            torch.zeros_like(tensor) if grad is None else grad
            for tensor, grad in zip(first, output_grads, strict=True)
        ],
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    return second[0], second[1], None, second[2], second[3]


if HAS_EXTENSION:
    torch.library.register_fake("co_detr::ms_deform_attn", _fake_forward)
    torch.library.register_fake("co_detr::ms_deform_attn_backward", _fake_backward)
    torch.library.register_autograd(
        "co_detr::ms_deform_attn", _forward_gradient, setup_context=_save_forward
    )
    torch.library.register_autograd(
        "co_detr::ms_deform_attn_backward", _backward_gradient, setup_context=_save_backward
    )
