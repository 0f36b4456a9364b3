"""Multi-scale deformable attention: the operator, its reference in PyTorch, and the module.

The compiled extension defines ``torch.ops.co_detr.ms_deform_attn`` and its backward for CPU and,
when built with CUDA, for CUDA. This file adds what the dispatcher needs beside kernels: shape
inference, autograd formulas (twice differentiable) and the fall-back to the PyTorch reference.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from co_detr.structures import tensor_on

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


def _fake_backward(
    grad_output, value, level_shapes, sampling_locations, attention_weights, deterministic
):
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
    # An argument, as kernels built for many versions of PyTorch cannot ask for its settings.
    deterministic = torch.are_deterministic_algorithms_enabled()
    grads = torch.ops.co_detr.ms_deform_attn_backward(
        grad_output, value, ctx.level_shapes, locations, weights, deterministic
    )
    return grads[0], None, grads[1], grads[2]


def _save_backward(ctx, inputs, output):
    grad_output, value, ctx.level_shapes, sampling_locations, attention_weights, _ = inputs
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
    return second[0], second[1], None, second[2], second[3], None


if HAS_EXTENSION:
    torch.library.register_fake("co_detr::ms_deform_attn", _fake_forward)
    torch.library.register_fake("co_detr::ms_deform_attn_backward", _fake_backward)
    torch.library.register_autograd(
        "co_detr::ms_deform_attn", _forward_gradient, setup_context=_save_forward
    )
    torch.library.register_autograd(
        "co_detr::ms_deform_attn_backward", _backward_gradient, setup_context=_save_backward
    )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of locations, weights and sums for a ``value`` of ``dtype``: fp64 for fp64, else fp32.

    A bf16 location has steps of 2^-8 near 1.0, a third of a pixel on a 167 pixel wide level, so
    half precision belongs to the value and the output only.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def ms_deform_attn_reference(
    value: Tensor,
    level_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinear samples of every level (Deformable DETR, equation 3).

    Pixel centers are at half integers (``align_corners=False``) and pixels outside of a level are
    zero. Points that cannot touch a level, NaN and infinite ones included, contribute nothing and
    get no gradient.

    Args:
        value: ``(B, S, H, D)``, the levels flattened row by row and concatenated along S.
        level_shapes: ``(height, width)`` of every level, as Python integers.
        sampling_locations: ``(B, Q, H, L, P, 2)`` as (x, y) in [0, 1] of their level.
        attention_weights: ``(B, Q, H, L, P)``.

    Returns:
        ``(B, Q, H * D)`` in the dtype of ``value``, computed in :func:`accumulation_dtype`.
    """
    batch, _, heads, channels = value.shape
    queries, levels, points = sampling_locations.shape[1], *sampling_locations.shape[3:5]
    if batch * queries * heads * channels * levels * points == 0:
        # grid_sample refuses empty tensors; the zeros stay attached to the graph.
        empty_sum = value.sum() + sampling_locations.sum() + attention_weights.sum()
        return (empty_sum * 0).to(value.dtype).expand(batch, queries, heads * channels).clone()

    dtype = accumulation_dtype(value.dtype)
    device_type = value.device.type
    # An exported graph would keep even a context that changes nothing.
    enabled = torch.is_autocast_enabled(device_type)
    with torch.autocast(device_type, enabled=False) if enabled else contextlib.nullcontext():
        locations = sampling_locations.to(dtype)
        # A point reaches a level only between -0.5/size and 1 + 0.5/size. NaN compares false.
        reaches = ((locations > -1) & (locations < 2)).all(-1)
        grids = torch.where(reaches.unsqueeze(-1), locations * 2 - 1, -1.0)
        weights = torch.where(reaches, attention_weights.to(dtype), 0.0)

        samples = []
        maps = value.to(dtype).split([height * width for height, width in level_shapes], dim=1)
        for level, (height, width) in enumerate(level_shapes):
            image = maps[level].permute(0, 2, 3, 1)  # (B, H, D, S_l)
            image = image.reshape(batch * heads, channels, height, width)
            grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B*H, Q, P, 2)
            samples.append(
                F.grid_sample(
                    image, grid, mode="bilinear", padding_mode="zeros", align_corners=False
                )
            )
        # (B*H, D, Q, L*P) times (B*H, 1, Q, L*P)
        weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
        output = (torch.cat(samples, dim=-1) * weights).sum(-1)
        output = output.view(batch, heads * channels, queries).transpose(1, 2)
    return output.to(value.dtype).contiguous()


class MultiScaleDeformableAttention(nn.Module):
    """Every query samples a few points around its reference on every level, for every head.

    1. Linear layers of the query give the offsets and (softmax over levels and points) the weights.
    2. Offsets are in pixels of the level around a reference point, or in halves of the reference
       box's size divided by the number of points.
    3. The sampled values are projected. Residual and dropout are left to the caller.

    Args:
        embed_dim: channels C of query, value and output; a multiple of ``num_heads``.
        num_heads: attention heads.
        num_levels: feature levels L.
        num_points: sampling points per head and level.
    """

    def __init__(
        self, embed_dim: int = 256, num_heads: int = 8, num_levels: int = 4, num_points: int = 4
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} must be a multiple of num_heads {num_heads}.")
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, samples * 2)
        self.attention_weights = nn.Linear(embed_dim, samples)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Point k of head h starts k + 1 pixels away in direction h, all with equal weight."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)  # (H, 2)
        # On the unit square, not the circle: the points then fall on pixel centers.
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None, :] * distances[None, None, :, None]
        offsets = offsets.expand(-1, self.num_levels, -1, -1)  # (H, L, P, 2)
        with torch.no_grad():
            nn.init.zeros_(self.sampling_offsets.weight)
            self.sampling_offsets.bias.copy_(offsets.flatten())
            nn.init.zeros_(self.attention_weights.weight)
            nn.init.zeros_(self.attention_weights.bias)
            for layer in (self.value_proj, self.output_proj):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Tensor,
        value: Tensor,
        reference: Tensor,
        level_shapes: list[tuple[int, int]],
        padding_mask: Tensor | None = None,
        level_sizes: Tensor | None = None,
    ) -> Tensor:
        """Attend from ``query`` to ``value``.

        Args:
            query: ``(B, Q, C)``, the position already added.
            value: ``(B, S, C)``, levels flattened row by row and concatenated.
            reference: ``(B, Q, L, 2)`` points or ``(B, Q, L, 4)`` cxcywh boxes, normalized to the
                padded level (already multiplied by the valid ratios).
            level_shapes: ``(height, width)`` of every level as Python integers.
            padding_mask: ``(B, S)`` bool, True = padding, whose projected value is zero.
            level_sizes: ``(L, 2)`` of ``level_shapes``, width before height, on the device, which
                points are moved in; None: they are copied there.

        Returns:
            ``(B, Q, C)``: output projection applied, no residual, no dropout.

        Raises:
            ValueError: a shape does not fit; the message names the argument.
        """
        self._check(query, value, reference, level_shapes, padding_mask)
        if level_sizes is not None and level_sizes.shape != (self.num_levels, 2):
            raise ValueError(
                f"level_sizes must have shape ({self.num_levels}, 2), got "
                f"{tuple(level_sizes.shape)}."
            )
        projected = self.value_proj(value)
        if padding_mask is not None:
            projected = projected.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        projected = projected.unflatten(-1, (self.num_heads, -1))  # (B, S, H, D)
        locations, weights = self.sampling_points(query, reference, level_shapes, level_sizes)
        output = ms_deform_attn(projected, level_shapes, locations, weights)
        return self.output_proj(output)

    def sampling_points(
        self,
        query: Tensor,
        reference: Tensor,
        level_shapes: list[tuple[int, int]],
        level_sizes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Where ``query`` looks, and how much of each sample it takes; see ``forward``.

        Returns:
            locations ``(B, Q, H, L, P, 2)`` as (x, y) in [0, 1] of their padded level, and weights
            ``(B, Q, H, L, P)`` that sum to 1 over levels and points, both of at least float32.
        """
        offsets = self.sampling_offsets(query)
        dtype = accumulation_dtype(offsets.dtype)
        shape = (*query.shape[:2], self.num_heads, self.num_levels, self.num_points)
        offsets = offsets.to(dtype).view(*shape, 2)
        weights = self.attention_weights(query).to(dtype).view(*shape[:3], -1)
        weights = weights.softmax(-1).view(shape)
        return self._locations(reference.to(dtype), offsets, level_shapes, level_sizes), weights

    def _locations(
        self,
        reference: Tensor,
        offsets: Tensor,
        level_shapes: list[tuple[int, int]],
        level_sizes: Tensor | None,
    ) -> Tensor:
        """(B, Q, L, 2 or 4) and (B, Q, H, L, P, 2) -> locations (B, Q, H, L, P, 2)."""
        reference = reference[:, :, None, :, None, :]
        if reference.shape[-1] == 2:
            if level_sizes is None:
                # Not new_tensor, which would make constants of the sizes when a model is exported.
                sizes = [(width, height) for height, width in level_shapes]
                level_sizes = tensor_on(sizes, offsets.dtype, offsets.device)
            return torch.addcdiv(reference, offsets, level_sizes.to(offsets.dtype)[:, None, :])
        extent = reference[..., 2:] * (0.5 / self.num_points)
        return torch.addcmul(reference[..., :2], offsets, extent)

    def _check(self, query, value, reference, level_shapes, padding_mask) -> None:
        embed_dim = self.value_proj.in_features
        for name, tensor in (("query", query), ("value", value)):
            if tensor.dim() != 3 or tensor.shape[-1] != embed_dim:
                raise ValueError(
                    f"{name} must have shape (B, N, {embed_dim}), got {tuple(tensor.shape)}."
                )
        if len(level_shapes) != self.num_levels:
            raise ValueError(
                f"level_shapes must have {self.num_levels} levels, got {len(level_shapes)}."
            )
        expected = (*query.shape[:2], self.num_levels)
        if tuple(reference.shape) not in ((*expected, 2), (*expected, 4)):
            raise ValueError(
                f"reference must have shape {(*expected, 2)} or {(*expected, 4)}, "
                f"got {tuple(reference.shape)}."
            )
        if padding_mask is not None and (
            padding_mask.dtype != torch.bool or padding_mask.shape != value.shape[:2]
        ):
            raise ValueError(
                f"padding_mask must be a bool tensor of shape {tuple(value.shape[:2])}, "
                f"got {padding_mask.dtype} {tuple(padding_mask.shape)}."
            )
