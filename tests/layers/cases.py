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


# Relative to the largest entry: half precision rounds the output and the value's gradient.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}

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


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    """Errors relative to the largest entry of each tensor, wherever the tensors are."""
    for name, tensor in actual.items():
        wanted = expected[name]
        assert tensor.shape == wanted.shape, name
        if tensor.numel() == 0:
            continue
        tensor, wanted = tensor.cpu().double(), wanted.cpu().double()
        error = (tensor - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


NOWHERE = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0**31, 5.0, -5.0]


def assert_nowhere_is_nothing(function, dtype: torch.dtype, device: str = "cpu") -> None:
    """NaN, infinite and far locations have to add nothing and to get gradients of zero."""
    case = Case(batch=1, queries=len(NOWHERE), channels=9)
    value, locations, weights = (t.detach() for t in case.tensors(dtype, device, spread=0))
    kept = locations.clone()
    for query, bad in enumerate(NOWHERE):
        locations[:, query, :, :, 0, query % 2] = bad  # only one of x and y is bad
        locations[:, query, :, 0, 1] = bad
    without = weights.clone()
    without[:, :, :, :, 0] = 0
    without[:, :, :, 0, 1] = 0
    tensors = tuple(t.requires_grad_() for t in (value, locations, weights))
    actual = outputs_and_gradients(function, case, tensors)
    assert all(tensor.isfinite().all() for tensor in actual.values())
    assert actual["locations"][:, :, :, :, 0].abs().max() == 0
    assert actual["weights"][:, :, :, :, 0].abs().max() == 0
    expected = outputs_and_gradients(
        function, case, tuple(t.detach().requires_grad_() for t in (value, kept, without))
    )
    for name in ("output", "value"):
        torch.testing.assert_close(actual[name], expected[name])


def assert_weights_do_not_matter_nowhere(
    function, dtype: torch.dtype, device: str = "cpu", channels: int = 9
) -> None:
    """A NaN or infinite weight of a point that touches no pixel has to add nothing."""
    case = Case(batch=1, queries=5, channels=channels)
    value, locations, weights = (t.detach() for t in case.tensors(dtype, device))
    locations[:, 2] = float("nan")
    locations[:, 3, ..., 0] = -7
    weights[:, 2] = float("nan")
    weights[:, 3] = float("inf")
    tensors = tuple(t.requires_grad_() for t in (value, locations, weights))
    actual = outputs_and_gradients(function, case, tensors)
    assert all(tensor.isfinite().all() for tensor in actual.values())
    for name in ("output", "locations", "weights"):
        assert actual[name][:, 2:4].count_nonzero() == 0, name
