"""Multi-scale deformable attention in plain PyTorch: always importable, differentiable twice."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor


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

    Pixel centres are at half integers (``align_corners=False``) and pixels outside of a level are
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
