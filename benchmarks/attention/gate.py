"""Only who computes the right thing is timed."""

import torch
from torch import Tensor

from co_detr.layers import ms_deform_attn_reference

from .cases import Inputs
from .contestants import Attention

NAMES = ("output", "gradient of value", "gradient of locations", "gradient of weights")
# Largest error relative to the largest entry. A 16-bit value rounds the output and its gradient.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 8e-3}
QUERIES_AT_ONCE = 4096


def exact_results(inputs: Inputs) -> list[Tensor]:
    """Output and gradients of the leaves in fp64, a few thousand queries at a time."""
    value = inputs.value.detach().double().requires_grad_()
    grad_value = torch.zeros_like(value)
    outputs, grads_locations, grads_weights = [], [], []
    queries = inputs.locations.shape[1]
    for first in range(0, queries, QUERIES_AT_ONCE):
        part = slice(first, first + QUERIES_AT_ONCE)
        locations, weights = (
            tensor.detach()[:, part].double().requires_grad_()
            for tensor in (inputs.locations, inputs.weights)
        )
        output = ms_deform_attn_reference(value, inputs.level_shapes, locations, weights)
        grads = torch.autograd.grad(
            output, (value, locations, weights), inputs.grad_output[:, part].double()
        )
        grad_value += grads[0]
        outputs.append(output.detach())
        grads_locations.append(grads[1])
        grads_weights.append(grads[2])
    return [
        torch.cat(outputs, 1),
        grad_value,
        torch.cat(grads_locations, 1),
        torch.cat(grads_weights, 1),
    ]


def fault(attend: Attention, inputs: Inputs, exact: list[Tensor]) -> str | None:
    """Why a contestant may not take part: what it gets wrong, or the error it raises."""
    try:
        output = attend(inputs)
        grads = torch.autograd.grad(output, inputs.leaves, inputs.grad_output)
    except Exception as error:  # somebody else's code: anything may come out of it
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    for name, tensor, wanted in zip(NAMES, (output.detach(), *grads), exact, strict=True):
        if tensor.shape != wanted.shape:
            return f"{name} has shape {tuple(tensor.shape)}, expected {tuple(wanted.shape)}"
        error = ((tensor.double() - wanted).abs().max() / wanted.abs().max()).item()
        if not error <= TOLERANCES[inputs.value.dtype]:
            return f"{name} is off by {error:.1e} of its largest entry"
    return None
