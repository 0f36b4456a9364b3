"""What surrounds the kernels: autocast, bad arguments, a missing extension, the module."""

import warnings

import pytest
import torch

from co_detr.layers import MultiScaleDeformableAttention, ms_deform_attn
from co_detr.layers import deformable_attention as op
from tests.layers.cases import Case, outputs_and_gradients

CASE = Case()
SHAPES = list(CASE.level_shapes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_kernel", [True, False], ids=["kernel", "reference"])
def test_autocast_lowers_the_value_only(dtype, has_kernel, monkeypatch):
    if not has_kernel:
        monkeypatch.setattr(op, "KERNEL_DEVICES", frozenset())
        monkeypatch.setattr(op, "_warn_about_fallback", lambda device_type: None)
    value, locations, weights = CASE.tensors(torch.float32)
    with torch.autocast("cpu", dtype):
        output = ms_deform_attn(value, SHAPES, locations, weights)
    assert output.dtype == dtype
    lowered = ms_deform_attn(value.to(dtype), SHAPES, locations, weights)
    assert torch.equal(output, lowered)
    grads = torch.autograd.grad(output.float().sum(), (value, locations, weights))
    assert all(grad.dtype == torch.float32 for grad in grads)
    with torch.autocast("cpu", dtype):  # fp64 is asked for on purpose: it stays
        assert ms_deform_attn(*with_shapes(CASE.tensors())).dtype == torch.float64


def with_shapes(tensors):
    return tensors[0], SHAPES, tensors[1], tensors[2]


def test_half_precision_weights_are_accepted():
    value, locations, weights = CASE.tensors(torch.bfloat16)
    lowered = weights.to(torch.bfloat16)
    output = ms_deform_attn(value, SHAPES, locations, lowered)
    expected = ms_deform_attn(value, SHAPES, locations, lowered.float())
    assert torch.equal(output, expected)


VALUE, LOCATIONS, WEIGHTS = (tensor.detach() for tensor in CASE.tensors())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((VALUE[0], SHAPES, LOCATIONS, WEIGHTS), "value must have shape"),
        ((VALUE.long(), SHAPES, LOCATIONS, WEIGHTS), "value must be fp32"),
        ((VALUE, [], LOCATIONS, WEIGHTS), "level_shapes must name"),
        ((VALUE, SHAPES[:2], LOCATIONS, WEIGHTS), "level_shapes .* describe 54 pixels"),
        ((VALUE, [(6, 7), (3, 4), (-1, -1)], LOCATIONS, WEIGHTS), "level_shapes must be pairs"),
        ((VALUE, [(6, 7, 1), (3, 4), (1, 1)], LOCATIONS, WEIGHTS), "level_shapes must be pairs"),
        ((VALUE, SHAPES, LOCATIONS[..., :1], WEIGHTS), "sampling_locations must have shape"),
        ((VALUE, SHAPES, LOCATIONS[:1], WEIGHTS), "sampling_locations must have shape"),
        ((VALUE, SHAPES, LOCATIONS[:, :, :1], WEIGHTS), "sampling_locations must have shape"),
        ((VALUE, SHAPES, LOCATIONS.long(), WEIGHTS), "sampling_locations must be floating"),
        ((VALUE, SHAPES, LOCATIONS, WEIGHTS[:, :2]), "attention_weights must have shape"),
        ((VALUE, SHAPES, LOCATIONS, WEIGHTS.bool()), "attention_weights must be floating"),
        ((VALUE, SHAPES, LOCATIONS.to("meta"), WEIGHTS), "sampling_locations is on meta"),
        ((VALUE, SHAPES, LOCATIONS, WEIGHTS.to("meta")), "attention_weights is on meta"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(*arguments)


def test_missing_extension_warns_once_and_gives_the_same_numbers(monkeypatch):
    expected = outputs_and_gradients(ms_deform_attn, CASE, CASE.tensors())
    monkeypatch.setattr(op, "KERNEL_DEVICES", frozenset())
    op._warn_about_fallback.cache_clear()
    with pytest.warns(UserWarning, match="no compiled MSDeformAttn kernel"):
        actual = outputs_and_gradients(ms_deform_attn, CASE, CASE.tensors())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ms_deform_attn(*with_shapes(CASE.tensors()))
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-11, atol=1e-11)


@pytest.fixture
def module() -> MultiScaleDeformableAttention:
    torch.manual_seed(0)
    module = MultiScaleDeformableAttention(16, num_heads=2, num_levels=3, num_points=4)
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.1)
    return module


def test_module_ignores_what_padding_holds(module):
    query, value = torch.randn(2, 5, 16), torch.randn(2, 55, 16)
    reference = torch.rand(2, 5, 3, 2)
    padding = torch.zeros(2, 55, dtype=torch.bool)
    padding[1, 20:40] = True
    first = module(query, value, reference, SHAPES, padding)
    second = module(query, value.masked_fill(padding[..., None], 99.0), reference, SHAPES, padding)
    assert torch.equal(first, second)
    assert not torch.equal(first, module(query, value, reference, SHAPES))


def test_module_under_autocast_keeps_fp32_locations(module):
    query, value = torch.randn(1, 5, 16), torch.randn(1, 55, 16)
    reference = torch.rand(1, 5, 3, 4)
    expected = module(query, value, reference, SHAPES)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(query, value, reference, SHAPES)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)


def test_module_names_bad_arguments(module):
    query, value = torch.randn(1, 5, 16), torch.randn(1, 55, 16)
    reference = torch.rand(1, 5, 3, 2)
    with pytest.raises(ValueError, match="query must have shape"):
        module(query[..., :8], value, reference, SHAPES)
    with pytest.raises(ValueError, match="reference must have shape"):
        module(query, value, reference[:, :, :2], SHAPES)
    with pytest.raises(ValueError, match="level_shapes must have 3 levels"):
        module(query, value, reference, SHAPES[:2])
    with pytest.raises(ValueError, match="padding_mask must be a bool"):
        module(query, value, reference, SHAPES, torch.zeros(1, 55))
    with pytest.raises(ValueError, match=r"level_sizes must have shape \(3, 2\), got \(2, 2\)"):
        module(query, value, reference, SHAPES, level_sizes=torch.ones(2, 2))
    with pytest.raises(ValueError, match="multiple of num_heads"):
        MultiScaleDeformableAttention(16, num_heads=3)
