"""The multi-scale deformable attention module (Deformable DETR, section 4.1)."""

import math

import torch
from torch import Tensor, nn

from co_detr.transfer import tensor_on

from .ms_deform_attn_op import ms_deform_attn
from .ms_deform_attn_reference import accumulation_dtype


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
        # On the unit square, not the circle: the points then fall on pixel centres.
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
    ) -> Tensor:
        """Attend from ``query`` to ``value``.

        Args:
            query: ``(B, Q, C)``, the position already added.
            value: ``(B, S, C)``, levels flattened row by row and concatenated.
            reference: ``(B, Q, L, 2)`` points or ``(B, Q, L, 4)`` cxcywh boxes, normalised to the
                padded level (already multiplied by the valid ratios).
            level_shapes: ``(height, width)`` of every level as Python integers.
            padding_mask: ``(B, S)`` bool, True = padding, whose projected value is zero.

        Returns:
            ``(B, Q, C)``: output projection applied, no residual, no dropout.

        Raises:
            ValueError: a shape does not fit; the message names the argument.
        """
        self._check(query, value, reference, level_shapes, padding_mask)
        projected = self.value_proj(value)
        if padding_mask is not None:
            projected = projected.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        projected = projected.unflatten(-1, (self.num_heads, -1))  # (B, S, H, D)
        locations, weights = self.sampling_points(query, reference, level_shapes)
        output = ms_deform_attn(projected, level_shapes, locations, weights)
        return self.output_proj(output)

    def sampling_points(
        self, query: Tensor, reference: Tensor, level_shapes: list[tuple[int, int]]
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
        return self._locations(reference.to(dtype), offsets, level_shapes), weights

    def _locations(
        self, reference: Tensor, offsets: Tensor, level_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """(B, Q, L, 2 or 4) and (B, Q, H, L, P, 2) -> locations (B, Q, H, L, P, 2)."""
        reference = reference[:, :, None, :, None, :]
        if reference.shape[-1] == 2:
            # Not new_tensor, which would make constants of the sizes when the model is exported.
            sizes = [(width, height) for height, width in level_shapes]
            sizes = tensor_on(sizes, offsets.dtype, offsets.device)
            return torch.addcdiv(reference, offsets, sizes[:, None, :])
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
