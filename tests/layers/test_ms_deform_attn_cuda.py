"""What is particular to the CUDA kernels, beyond what test_ms_deform_attn_kernels asks of all."""

import warnings
from dataclasses import replace

import pytest
import torch

from co_detr.layers import ms_deform_attn
from co_detr.layers.deformable_attention import KERNEL_DEVICES
from tests.layers.cases import CASES, TOLERANCES, Case, assert_close, outputs_and_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "cuda" not in KERNEL_DEVICES, reason="co_detr was installed without a CUDA kernel"
    ),
]
LEVELS = ((9, 12), (5, 6), (3, 3), (2, 1), (1, 1), (1, 4))
# 32 channels, 4 points and 3 to 5 levels have kernels of their own.
SHAPES = [
    Case(channels=channels, heads=3, queries=70, points=points, level_shapes=LEVELS[:levels])
    for channels, points, levels in (
        *((32, 4, levels) for levels in range(1, 7)),
        *((32, points, 4) for points in (1, 3, 5, 8)),
        *((channels, 4, 4) for channels in (1, 4, 8, 31, 33, 40, 64, 96)),
    )
]


def describe(case: Case) -> str:
    return f"D{case.channels}-P{case.points}-L{len(case.level_shapes)}"


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def on_cuda(tensors: tuple[torch.Tensor, ...], device: str = "cuda") -> tuple[torch.Tensor, ...]:
    return tuple(tensor.detach().to(device).requires_grad_() for tensor in tensors)


def assert_same_bits(first: dict, second: dict) -> None:
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=short_name)
@pytest.mark.parametrize("case", SHAPES, ids=describe)
def test_equals_cpu(case, dtype):
    tensors = case.tensors(dtype)
    expected = outputs_and_gradients(ms_deform_attn, case, tensors)
    actual = outputs_and_gradients(ms_deform_attn, case, on_cuda(tensors))
    assert_close(actual, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=short_name)
@pytest.mark.parametrize("case", SHAPES, ids=describe)
def test_deterministic_mode_equals_cpu(case, dtype, deterministic):
    tensors = case.tensors(dtype)
    expected = outputs_and_gradients(ms_deform_attn, case, tensors)
    actual = outputs_and_gradients(ms_deform_attn, case, on_cuda(tensors))
    assert_close(actual, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("case", [CASES["no queries"], CASES["no images"], CASES["no points"]])
def test_deterministic_mode_without_work(case, deterministic):
    actual = outputs_and_gradients(ms_deform_attn, case, on_cuda(case.tensors(torch.float32)))
    assert all(tensor.abs().sum() == 0 for tensor in actual.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short_name)
def test_deterministic_mode_repeats_its_bits(dtype, deterministic):
    # Thousands of points share the few pixels of the last levels.
    case = Case(
        queries=5000, heads=8, channels=32, level_shapes=((40, 50), (20, 25), (3, 4), (1, 1))
    )
    tensors = on_cuda(case.tensors(dtype))
    first = outputs_and_gradients(ms_deform_attn, case, tensors)
    for _ in range(3):
        assert_same_bits(first, outputs_and_gradients(ms_deform_attn, case, tensors))


def test_deterministic_mode_takes_the_heads_in_turns(deterministic):
    # More points than one list holds, so that every list has two of the three pairs at most.
    case = Case(
        batch=1,
        queries=150_000,
        heads=3,
        channels=4,
        points=4,
        level_shapes=((9, 9), (5, 5), (2, 2)),
    )
    tensors = case.tensors(torch.float64)
    expected = outputs_and_gradients(ms_deform_attn, case, tensors)
    actual = outputs_and_gradients(ms_deform_attn, case, on_cuda(tensors))
    assert_close(actual, expected, 1e-11)


def test_deterministic_mode_that_only_warns_has_nothing_to_warn_of():
    # Thousands of points share pixels: threads that add in any order would differ.
    case = Case(
        queries=5000, heads=8, channels=32, level_shapes=((40, 50), (20, 25), (3, 4), (1, 1))
    )
    tensors = on_cuda(case.tensors(torch.float32))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first = outputs_and_gradients(ms_deform_attn, case, tensors)
            assert_same_bits(first, outputs_and_gradients(ms_deform_attn, case, tensors))
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradcheck_in_deterministic_mode(deterministic):
    case = Case(batch=1, queries=2, heads=2, channels=3, points=2, level_shapes=((3, 4), (1, 1)))
    tensors = on_cuda(case.tensors(torch.float64, spread=0.1))

    def function(*inputs):
        return ms_deform_attn(inputs[0], case.level_shapes, *inputs[1:])

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("channels", [5, 32], ids=["generic", "usual"])
def test_non_contiguous_inputs(channels):
    case = Case(heads=3, channels=channels, level_shapes=LEVELS[:4])
    dense = on_cuda(case.tensors(torch.float32))
    strided = (
        dense[0].detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        # A view that starts at an odd address.
        torch.cat([dense[1].detach().new_zeros(1), dense[1].detach().flatten()])[1:].view_as(
            dense[1]
        ),
        dense[2].detach().transpose(1, 3).contiguous().transpose(1, 3),
    )
    assert not strided[0].is_contiguous() and strided[1].data_ptr() % 16 != 0
    actual = outputs_and_gradients(
        ms_deform_attn, case, tuple(tensor.requires_grad_() for tensor in strided)
    )
    assert_close(actual, outputs_and_gradients(ms_deform_attn, case, dense), 1e-5)


def test_runs_on_the_current_stream():
    case = Case(queries=200, heads=8, channels=32, level_shapes=LEVELS[:4])
    tensors = on_cuda(case.tensors(torch.float32))
    expected = outputs_and_gradients(ms_deform_attn, case, tensors)
    value, locations, weights = (tensor.detach() for tensor in tensors)
    late_value = torch.zeros_like(value)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would see the zeros
        late_value.copy_(value)
        output = ms_deform_attn(late_value, list(case.level_shapes), locations, weights)
    stream.synchronize()
    assert torch.equal(output, expected["output"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_its_inputs():
    case = CASES["usual"]
    tensors = case.tensors(torch.float32)
    expected = outputs_and_gradients(ms_deform_attn, case, tensors)
    assert torch.cuda.current_device() == 0
    actual = outputs_and_gradients(ms_deform_attn, case, on_cuda(tensors, "cuda:1"))
    assert all(tensor.device == torch.device("cuda:1") for tensor in actual.values())
    assert torch.cuda.current_device() == 0
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("case", [SHAPES[3], SHAPES[0]], ids=describe)
def test_opcheck(case):
    value, locations, weights = on_cuda(case.tensors(torch.float32))
    shapes = [size for shape in case.level_shapes for size in shape]
    grad = torch.randn(case.batch, case.queries, case.heads * case.channels, device="cuda")
    operators = torch.ops.co_detr
    torch.library.opcheck(operators.ms_deform_attn.default, (value, shapes, locations, weights))
    # The values of a gradient that threads add up in any order differ from run to run.
    torch.library.opcheck(
        operators.ms_deform_attn_backward.default,
        (grad.requires_grad_(), value, shapes, locations, weights, False),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("is_deterministic", [False, True], ids=["usual", "deterministic"])
@pytest.mark.parametrize("batch", [1, 5], ids=["one image", "several images"])
def test_offsets_beyond_32_bits(batch, is_deterministic, request):
    if is_deterministic:
        request.getfixturevalue("deterministic")
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of free GPU memory")
    # 2.2e9 numbers of bf16: 4.4 GB, and 8.8 GB for the fp32 gradient.
    heads, channels, width = 8, 32, 1000
    height = 2_200_000_000 // (batch * heads * channels * width)
    level_shapes = [(1, 1), (1, 1), (height, width)]
    value = torch.zeros(
        batch, height * width + 2, heads, channels, dtype=torch.bfloat16, device="cuda"
    )
    assert value.numel() > 2**31
    # All points on the center of the last pixel of their image; together they have weight 1.
    numbers = torch.arange(1.0, batch + 1, device="cuda").view(-1, 1, 1)
    value[:, -1] = numbers
    value.requires_grad_()
    locations = torch.tensor([1 - 0.5 / width, 1 - 0.5 / height], device="cuda")
    locations = locations.expand(batch, 1, heads, 3, 4, 2).contiguous()
    weights = torch.zeros(batch, 1, heads, 3, 4, device="cuda")
    weights[:, :, :, 2] = 0.25
    output = ms_deform_attn(value, level_shapes, locations, weights)
    torch.testing.assert_close(output.float(), numbers.expand_as(output), rtol=0.05, atol=0)
    (grad,) = torch.autograd.grad(output.float().sum(), value)
    last = grad[:, -1].float()
    torch.testing.assert_close(last, torch.ones_like(last), rtol=0.05, atol=0)
    assert grad[:, : height * width // 2].count_nonzero() == 0


def test_too_many_levels_are_refused():
    case = replace(CASES["one vector"], level_shapes=((1, 1),) * 65)
    value, locations, weights = on_cuda(case.tensors(torch.float32))
    with pytest.raises(ValueError, match="at most 64 levels"):
        ms_deform_attn(value, list(case.level_shapes), locations, weights)
