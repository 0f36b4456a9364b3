"""The problems to time: sizes, realistic sampling points, and the least bytes they have to move."""

from dataclasses import dataclass

import torch
from torch import Tensor

HEADS, CHANNELS, POINTS = 8, 32, 4
SPREADS = {"2px": 2.0, "8px": 8.0, "uniform": None}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Inputs:
    """One call: leaves that require gradients, and the level shapes in all forms people want."""

    value: Tensor  # (B, S, H, D)
    locations: Tensor  # (B, Q, H, L, P, 2), fp32 for a 16-bit value too
    weights: Tensor  # (B, Q, H, L, P)
    grad_output: Tensor  # (B, Q, H * D)
    level_shapes: list[tuple[int, int]]
    shapes_tensor: Tensor  # (L, 2), height and width
    level_starts: Tensor  # (L,)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.locations, self.weights


@dataclass(frozen=True)
class Case:
    """Sizes of a call; H, D and P are those of all Deformable-DETR models."""

    batch: int
    level_shapes: tuple[tuple[int, int], ...]
    queries: int | None = None  # None: every pixel is a query, as in an encoder

    @property
    def pixels(self) -> int:
        return sum(height * width for height, width in self.level_shapes)

    def inputs(self, spread: str, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        """Random tensors; points lie around the query's own pixel or a random place."""
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.tensor([(width, height) for height, width in self.level_shapes])
        centers = self._pixel_centers()
        if self.queries is not None:
            centers = torch.rand(self.queries, 2, generator=generator)
        shape = (self.batch, len(centers), HEADS, len(self.level_shapes), POINTS)
        if SPREADS[spread] is None:
            locations = torch.rand(*shape, 2, generator=generator)
        else:
            offsets = torch.randn(*shape, 2, generator=generator) * SPREADS[spread]
            locations = centers[None, :, None, None, None] + offsets / sizes[:, None]
        weights = torch.rand(shape, generator=generator).flatten(3).softmax(-1).view(shape)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        shapes_tensor = torch.tensor(self.level_shapes, device=device)
        areas = shapes_tensor.prod(1)
        return Inputs(
            value=normal(self.batch, self.pixels, HEADS, CHANNELS).requires_grad_(),
            locations=_off_centers(locations, sizes).to(device).requires_grad_(),
            weights=weights.to(device).requires_grad_(),
            grad_output=normal(self.batch, len(centers), HEADS * CHANNELS),
            level_shapes=list(self.level_shapes),
            shapes_tensor=shapes_tensor,
            level_starts=areas.cumsum(0) - areas,
        )

    def least_bytes(self, dtype: torch.dtype) -> dict[str, int]:
        """Bytes that have to cross the memory bus once, by pass.

        Forward reads value, locations and weights and writes the output. Backward reads these and
        the gradient of the output, clears and writes the fp32 gradient of the value, and writes
        the gradients of locations and weights. A decoder may not touch every pixel, but its
        gradient has to be cleared all the same; its forward bound is an upper bound of the least.
        """
        queries = self.pixels if self.queries is None else self.queries
        rows = self.batch * queries * HEADS
        points = rows * len(self.level_shapes) * POINTS
        pixels = self.batch * self.pixels * HEADS * CHANNELS
        value, output = pixels * dtype.itemsize, rows * CHANNELS * dtype.itemsize
        locations, weights = points * 2 * 4, points * 4
        forward = value + locations + weights + output
        backward = forward + 2 * pixels * 4 + locations + weights
        return {
            "forward": forward,
            "backward": backward,
            "forward+backward": forward + backward,
        }

    def _pixel_centers(self) -> Tensor:
        """(S, 2): x and y of all pixels of all levels."""
        grids = []
        for height, width in self.level_shapes:
            y, x = torch.meshgrid(
                (torch.arange(height) + 0.5) / height,
                (torch.arange(width) + 0.5) / width,
                indexing="ij",
            )
            grids.append(torch.stack([x, y], -1).flatten(0, 1))
        return torch.cat(grids)


def _off_centers(locations: Tensor, sizes: Tensor) -> Tensor:
    """Moves points by 0.01 px from where gradients jump, so that rounding cannot choose a side."""
    sizes = sizes[:, None].double()
    pixels = locations.double() * sizes - 0.5
    fraction = (pixels - pixels.floor()).clamp(0.01, 0.99)
    return ((pixels.floor() + fraction + 0.5) / sizes).to(locations.dtype)


SMALL_LEVELS = ((80, 112), (40, 56), (20, 28), (10, 14))  # 640 x 896, strides 8 to 64
LARGE_LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))  # 800 x 1333, strides 8 to 64
FIVE_LEVELS = ((200, 334), *LARGE_LEVELS)  # strides 4 to 64, as in Co-DINO
CASES = {
    "enc-640x896-B1": Case(1, SMALL_LEVELS),
    "dec-300-640x896-B1": Case(1, SMALL_LEVELS, 300),
    "enc-800x1333-B2": Case(2, LARGE_LEVELS),
    "enc-5L-800x1333-B2": Case(2, FIVE_LEVELS),
    "dec-300-800x1333-B2": Case(2, LARGE_LEVELS, 300),
    "dec-900-5L-800x1333-B2": Case(2, FIVE_LEVELS, 900),
}
DEFAULT_CASES = {
    "cpu": ("enc-640x896-B1", "dec-300-640x896-B1"),
    "cuda": tuple(name for name in CASES if "800x1333" in name),
}
