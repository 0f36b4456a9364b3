"""Random problems for the MSDeformAttn kernels, against the reference in fp64.

    python -m tests.layers.fuzz --cases 2000

Sizes, strides, dtypes and locations are random; NaN, infinite and huge locations among them. Output
and all three gradients have to agree. Every case is made from its number alone, so that a failure
can be repeated with ``--first``.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from co_detr.layers import ms_deform_attn, ms_deform_attn_reference
from co_detr.layers.deformable_attention import KERNEL_DEVICES

# Relative to the largest entry. Gradients of locations sum more and larger terms than the output.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
NOWHERE = (float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0**31, -(2.0**31), 7.0, -7.0)
NAMES = ("output", "value", "locations", "weights")


@dataclass(frozen=True)
class Problem:
    """Inputs of one call, and the gradient of its output; leaves that require gradients."""

    number: int
    dtype: torch.dtype
    level_shapes: list[tuple[int, int]]
    value: Tensor
    locations: Tensor
    weights: Tensor
    grad_output: Tensor

    def __str__(self) -> str:
        return (
            f"case {self.number}: {self.dtype}, value {tuple(self.value.shape)}, "
            f"levels {self.level_shapes}, locations {tuple(self.locations.shape)}"
        )


def make_problem(number: int, device: str = "cpu") -> Problem:
    """The random problem of this number, the same on every device."""
    choices = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    dtype = choices.choice(list(TOLERANCES))
    small = torch.float64 if dtype == torch.float64 else torch.float32
    batch, heads = choices.randint(1, 3), choices.randint(1, 9)
    channels = choices.choice([1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 24, 31, 32, 33, 40, 64])
    levels, points = choices.randint(1, 5), choices.randint(1, 9)
    queries = choices.choice([1, 2, 3, 7, 16, 17, 33, 70])
    shapes = [(choices.randint(1, 12), choices.randint(1, 12)) for _ in range(levels)]
    pixels = sum(height * width for height, width in shapes)

    def random_tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (batch, queries, heads, levels, points)
    spread = choices.choice([0.3, 0.6, 3.0])
    locations = 0.5 + spread * random_tensor(*shape, 2)
    sizes = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float64)
    locations = away_from_kinks(locations, sizes[:, None, :])
    if choices.random() < 0.5:
        bad = torch.rand(locations.shape, generator=generator) < 0.1
        locations[bad] = choices.choice(NOWHERE)
    weights = random_tensor(*shape)

    def leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return with_random_strides(tensor.to(device, dtype), choices).requires_grad_()

    return Problem(
        number=number,
        dtype=dtype,
        level_shapes=shapes,
        value=leaf(random_tensor(batch, pixels, heads, channels), dtype),
        locations=leaf(locations, small),
        weights=leaf(weights, small),
        grad_output=with_random_strides(
            random_tensor(batch, queries, heads * channels).to(device, dtype), choices
        ),
    )


def away_from_kinks(locations: Tensor, sizes: Tensor) -> Tensor:
    """Moves points off pixel centers, where the gradient jumps and rounding decides the side."""
    pixels = locations * sizes - 0.5
    fraction = (pixels - pixels.floor()).clamp(0.01, 0.99)
    return (pixels.floor() + fraction + 0.5) / sizes


def with_random_strides(tensor: Tensor, choices: random.Random) -> Tensor:
    """The same numbers: dense, with permuted strides, as a slice, or at an odd address."""
    kind = choices.choice(["dense", "dense", "permuted", "slice", "shifted"])
    if kind == "permuted":
        order = list(range(tensor.dim()))
        choices.shuffle(order)
        inverse = [order.index(axis) for axis in range(tensor.dim())]
        return tensor.permute(order).contiguous().permute(inverse)
    if kind == "slice":
        axis = choices.randrange(tensor.dim())
        return torch.cat([tensor, tensor], axis).narrow(axis, 0, tensor.shape[axis])
    if kind == "shifted":
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    return tensor


def disagreement(problem: Problem, function=ms_deform_attn) -> str | None:
    """What the kernels behind ``function`` get wrong in this problem, None when all is right."""
    inputs = (problem.value, problem.locations, problem.weights)
    actual = run(function, problem, inputs)
    exact = tuple(tensor.detach().cpu().double().requires_grad_() for tensor in inputs)
    expected = run(ms_deform_attn_reference, problem, exact)
    for name, tensor, wanted in zip(NAMES, actual, expected, strict=True):
        if tensor.shape != wanted.shape:
            return f"{name}: shape {tuple(tensor.shape)}, expected {tuple(wanted.shape)}"
        tensor = tensor.cpu().double()
        if not tensor.isfinite().all():
            return f"{name}: not finite"
        error = (tensor - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)
        if not error <= TOLERANCES[problem.dtype]:  # NaN is an error, too
            return f"{name}: relative error {error:.1e}"
    return None


def run(function, problem: Problem, inputs: Sequence[Tensor]) -> list[Tensor]:
    value, locations, weights = inputs
    output = function(value, problem.level_shapes, locations, weights)
    grads = torch.autograd.grad(output, inputs, problem.grad_output.to(output))
    return [output.detach(), *grads]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 5], help="taken in turn")
    options = parser.parse_args(arguments)
    if options.device not in KERNEL_DEVICES:
        parser.error(f"co_detr was installed without a kernel for {options.device}")
    failures, dtypes = 0, Counter()
    for number in range(options.first, options.first + options.cases):
        torch.set_num_threads(options.threads[number % len(options.threads)])
        problem = make_problem(number, options.device)
        dtypes[str(problem.dtype).removeprefix("torch.")] += 1
        wrong = disagreement(problem)
        if wrong is not None:
            failures += 1
            print(f"FAIL {problem}: {wrong}", flush=True)
    print(f"{options.cases} cases ({dict(dtypes)}), {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
