"""The operator and the module against tensors of the reference implementation, in fp64."""

import pytest
import torch

from co_detr.layers import (
    MultiScaleDeformableAttention,
    ms_deform_attn,
    ms_deform_attn_reference,
)
from tests.golden import load_units


def shapes_of(case: dict) -> list[tuple[int, int]]:
    return [tuple(shape) for shape in case["spatial_shapes_hw"].tolist()]


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("function", [ms_deform_attn, ms_deform_attn_reference])
def test_function(function, index):
    case = load_units()["ms_deform_attn_function"][index]
    names = ("value", "sampling_locations", "attention_weights")
    inputs = [case[name].clone().requires_grad_() for name in names]
    output = function(inputs[0], shapes_of(case), *inputs[1:])
    torch.testing.assert_close(output, case["output"], rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(output, inputs, case["grad_output"])
    for name, grad in zip(names, grads, strict=True):
        torch.testing.assert_close(grad, case[f"grad_{name}"], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("index", [0, 1], ids=["points", "boxes"])
def test_module(index):
    case = load_units()["ms_deform_attn_module"][index]
    module = MultiScaleDeformableAttention(
        embed_dim=32,
        num_heads=case["num_heads"],
        num_levels=len(case["spatial_shapes_hw"]),
        num_points=case["num_points"],
    ).double()
    module.load_state_dict(case["state_dict"])
    query = case["query"].clone().requires_grad_()  # (Q, B, C)
    value = case["value"].clone().requires_grad_()  # (S, B, C)
    attended = module(
        (query + case["query_pos"]).transpose(0, 1),
        value.transpose(0, 1),
        case["reference_points"],
        shapes_of(case),
        case["key_padding_mask"],
    )
    output = attended.transpose(0, 1) + query
    torch.testing.assert_close(output, case["output"], rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(
        output, (query, value, module.sampling_offsets.weight), case["grad_output"]
    )
    for name, grad in zip(("query", "value", "sampling_offsets_weight"), grads, strict=True):
        torch.testing.assert_close(grad, case[f"grad_{name}"], rtol=1e-11, atol=1e-11)


def test_initial_parameters():
    case = load_units()["ms_deform_attn_init"]
    module = MultiScaleDeformableAttention(
        case["embed_dims"], case["num_heads"], case["num_levels"], case["num_points"]
    )
    bias = module.sampling_offsets.bias.detach()
    torch.testing.assert_close(bias, case["sampling_offsets_bias"], rtol=0, atol=1e-6)
    for parameter in (
        module.sampling_offsets.weight,
        module.attention_weights.weight,
        module.attention_weights.bias,
        module.value_proj.bias,
        module.output_proj.bias,
    ):
        assert parameter.abs().max() == 0
    assert module.value_proj.weight.std() > 0 and module.output_proj.weight.std() > 0
