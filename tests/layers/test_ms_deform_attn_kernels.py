"""The compiled kernels against the PyTorch reference."""

import pytest
import torch

from co_detr.layers import ms_deform_attn, ms_deform_attn_reference
from co_detr.layers.deformable_attention import KERNEL_DEVICES
from tests.layers.cases import (
    CASES,
    TOLERANCES,
    Case,
    assert_close,
    assert_nowhere_is_nothing,
    assert_weights_do_not_matter_nowhere,
    outputs_and_gradients,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def needs_kernel(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    device = callspec.params.get("device", "cpu") if callspec else "cpu"
    if device not in KERNEL_DEVICES:
        pytest.skip(f"co_detr was installed without a kernel for {device}")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("device", DEVICES)
def test_equals_reference(case: Case, dtype, device):
    actual = outputs_and_gradients(ms_deform_attn, case, case.tensors(dtype, device))
    assert actual["output"].dtype == actual["value"].dtype == dtype
    # The reference gets the same rounded inputs, in fp64.
    rounded = tuple(t.detach().double().requires_grad_() for t in case.tensors(dtype))
    expected = outputs_and_gradients(ms_deform_attn_reference, case, rounded)
    assert_close(actual, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous_inputs(device):
    case = CASES["odd channels"]
    dense = case.tensors(torch.float64, device)
    # The same numbers behind permuted strides, and a view that starts at an odd address.
    value = dense[0].detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    locations = dense[1].detach().flip(1).contiguous().flip(1).transpose(1, 2).contiguous()
    locations = locations.transpose(1, 2)
    weights = torch.cat([dense[2].detach().new_zeros(1), dense[2].detach().flatten()])[1:]
    strided = (value, locations, weights.view_as(dense[2]))
    assert not value.is_contiguous() and not locations.is_contiguous()
    actual = outputs_and_gradients(
        ms_deform_attn, case, tuple(tensor.requires_grad_() for tensor in strided)
    )
    expected = outputs_and_gradients(ms_deform_attn, case, dense)
    assert_close(actual, {k: v.cpu() for k, v in expected.items()}, 1e-12)


@pytest.mark.parametrize("function", [ms_deform_attn, ms_deform_attn_reference])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("device", DEVICES)
def test_points_that_are_nowhere_contribute_nothing(function, dtype, device):
    assert_nowhere_is_nothing(function, dtype, device)
    assert_weights_do_not_matter_nowhere(function, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck_and_gradgradcheck(device):
    case = Case(batch=1, queries=2, heads=2, channels=3, points=2, level_shapes=((3, 4), (1, 1)))
    tensors = case.tensors(torch.float64, device, spread=0.1)

    def function(*inputs):
        return ms_deform_attn(inputs[0], case.level_shapes, *inputs[1:])

    assert torch.autograd.gradcheck(function, tensors, nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(function, tensors, nondet_tol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    case = CASES["one vector"]
    value, locations, weights = case.tensors(torch.float32, device)
    shapes = [size for shape in case.level_shapes for size in shape]
    grad = torch.randn(case.batch, case.queries, case.heads * case.channels, device=device)
    operators = torch.ops.co_detr
    torch.library.opcheck(operators.ms_deform_attn.default, (value, shapes, locations, weights))
    torch.library.opcheck(
        operators.ms_deform_attn_backward.default,
        (grad.requires_grad_(), value, shapes, locations, weights, False),
    )


def test_cpu_gradients_have_the_same_bits_for_any_number_of_threads():
    case = Case(batch=1, queries=50, heads=3, channels=32)  # the queries share pixels
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5, 5):  # 5 > heads: levels are shared out too
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(ms_deform_attn, case, case.tensors(torch.float32)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, tensor in other.items():
            assert torch.equal(tensor, results[0][name]), name


def test_operators_reject_what_would_read_out_of_bounds():
    value, locations, weights = CASES["one vector"].tensors()
    for shapes in ([6, 7, 3, 4], [6, 7, 3, 4, 2, 1], [6, 7, 3, 4, 0, 1], [-6, -7, 3, 4, 1, 1]):
        with pytest.raises(ValueError, match="level_shapes"):
            torch.ops.co_detr.ms_deform_attn(value, shapes, locations, weights)
    for shapes, pixels in (([6, 7, 3, 4, 2, 1], 56), ([6, 7, 2, 4, 1, 1], 51)):
        with pytest.raises(ValueError, match=f"describe {pixels} pixels, but value has 55"):
            torch.ops.co_detr.ms_deform_attn(value, shapes, locations, weights)
    shapes = [6, 7, 3, 4, 1, 1]
    with pytest.raises(ValueError, match="attention_weights"):
        torch.ops.co_detr.ms_deform_attn(value, shapes, locations, weights[:, 1:])
    with pytest.raises(ValueError, match="sampling_locations"):
        torch.ops.co_detr.ms_deform_attn(value, shapes, locations.float(), weights)
    with pytest.raises(ValueError, match="grad_output"):
        torch.ops.co_detr.ms_deform_attn_backward(
            value.flatten()[:4], value, shapes, locations, weights, False
        )


@pytest.mark.parametrize(
    ("pixels", "shapes"),
    [
        (2**31, [2**16, 2**15]),
        (2**31 - 1, [1, 2**31 - 1]),
        (2**40, [2**39, 2**40, 2**39, 2**40]),  # whose product does not fit in 64 bits
    ],
)
def test_operators_reject_more_pixels_than_32_bits_count(pixels, shapes):
    value = torch.zeros(1, 1, 1, 1).expand(1, pixels, 1, 1)
    locations = torch.zeros(1, 1, 1, len(shapes) // 2, 1, 2)
    message = rf"value must have fewer than 2\^31 - 1 pixels per image, got {pixels}"
    with pytest.raises(ValueError, match=message):
        torch.ops.co_detr.ms_deform_attn(value, shapes, locations, locations[..., 0])


@pytest.mark.slow
def test_compiles_into_one_graph():
    case = CASES["usual"]
    tensors = case.tensors(torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(value, level_shapes, locations, weights):
        return ms_deform_attn(value, level_shapes, locations, weights) * 2

    actual = outputs_and_gradients(compiled, case, tensors)
    expected = outputs_and_gradients(lambda *inputs: ms_deform_attn(*inputs) * 2, case, tensors)
    assert_close(actual, expected, 1e-6)
