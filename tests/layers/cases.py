"""Inputs for the MSDeformAttn tests."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Sizes of one attention problem; letters as in the docstrings of the operator."""

    batch: int = 2
    queries: int = 7
    heads: int = 2
    channels: int = 8
    points: int = 4
    level_shapes: tuple[tuple[int, int], ...] = ((6, 7), (3, 4), (1, 1))

    def tensors(
        self, dtype: torch.dtype = torch.float64, device: str = "cpu", spread: float = 0.3
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Value, sampling locations up to ``spread`` outside of the level, attention weights.

        Locations and weights are fp32 unless ``dtype`` is fp64.
        """
        generator = torch.Generator().manual_seed(0)
        pixels = sum(height * width for height, width in self.level_shapes)
        shape = (self.batch, self.queries, self.heads, len(self.level_shapes), self.points)
        value = torch.randn(
            self.batch, pixels, self.heads, self.channels, generator=generator, dtype=torch.float64
        )
        locations = torch.rand(*shape, 2, generator=generator, dtype=torch.float64)
        locations = locations * (1 + 2 * spread) - spread
        weights = torch.rand(shape, generator=generator, dtype=torch.float64)
        small = torch.float64 if dtype == torch.float64 else torch.float32
        return (
            value.to(device, dtype).requires_grad_(),
            locations.to(device, small).requires_grad_(),
            weights.to(device, small).requires_grad_(),
        )


# Name -> sizes that take different paths through the kernels.
CASES = {
    "usual": Case(channels=32, heads=8),
    "wide": Case(channels=64),
    "one vector": Case(channels=8),
    "vector and rest": Case(channels=45),
    "odd channels": Case(channels=5, heads=3),
    "one channel": Case(channels=1, heads=1),
    "1x1 levels only": Case(level_shapes=((1, 1), (1, 1))),
    "one pixel wide": Case(level_shapes=((9, 1), (1, 9))),
    "one point": Case(points=1, level_shapes=((5, 4),)),
    "odd points": Case(points=3, heads=5),
    "five levels": Case(level_shapes=((8, 8), (4, 4), (2, 2), (1, 1), (3, 2))),
    "batch of three": Case(batch=3),
    "no queries": Case(queries=0),
    "no images": Case(batch=0),
    "no points": Case(points=0),
}


def outputs_and_gradients(function, case: Case, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Runs ``function`` forward and backward with a fixed gradient of the output."""
    value, locations, weights = tensors
    output = function(value, list(case.level_shapes), locations, weights)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad(output, tensors, grad.to(output))
    return dict(
        zip(("output", "value", "locations", "weights"), (output.detach(), *grads), strict=True)
    )
