"""The CUDA kernels without a GPU: compiled for the CPU, the lanes of a warp in lock step.

Every launch is watched: a lane that does not come to a shuffle, memory that is not the kernel's,
16 bytes at an address that is no multiple of 16, a number that two threads write, and results that
were never written (the memory is full of NaN) are errors. ``lockstep/`` has how.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator

import pytest
import torch

from co_detr.layers import ms_deform_attn_reference
from tests.layers.cases import (
    CASES,
    TOLERANCES,
    Case,
    assert_close,
    assert_nowhere_is_nothing,
    assert_weights_do_not_matter_nowhere,
    outputs_and_gradients,
)
from tests.layers.fuzz import disagreement, make_problem
from tests.layers.lockstep import build as lockstep

COMPILER = shutil.which("g++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="needs g++ to compile the CUDA kernels"),
]

# Ways to the gradient of the value: atomic additions of single numbers, as on GPUs before the H100,
# of 16 bytes, and the deterministic gather. The other gradients come from the same kernels.
MODES = ("atomics", "vectors", "deterministic")
LEVELS = ((9, 12), (5, 6), (3, 3), (2, 1), (1, 1), (1, 4))
# 32 channels, 4 points and 3 to 5 levels have kernels of their own. 35 queries fill no block.
SHAPES = [
    Case(channels=channels, heads=2, queries=35, points=points, level_shapes=LEVELS[:levels])
    for channels, points, levels in (
        *((32, 4, levels) for levels in range(1, 7)),
        *((32, points, 2) for points in (1, 2, 3, 5, 6, 7, 8)),
        *((channels, 4, 2) for channels in (1, 3, 4, 8, 31, 33, 40, 64)),
    )
]


@pytest.fixture(scope="module")
def device(request) -> lockstep.Device:
    folder = request.config.cache.mkdir("lockstep")  # the compiler needs half a minute
    return lockstep.Device(lockstep.build(folder, COMPILER))


@contextlib.contextmanager
def running(device: lockstep.Device, mode: str) -> Iterator[None]:
    """Tensors of the device can be made inside, and gradients take this way."""
    torch.use_deterministic_algorithms(mode == "deterministic")
    # Or torch fills new tensors by itself, and what a kernel does not write is not seen.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with device.memory(), device.capability(9 if mode == "vectors" else 8):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def check(device: lockstep.Device, case: Case, dtype: torch.dtype, modes=MODES) -> None:
    """Output and gradients, in every mode, against the reference in fp64."""
    exact = tuple(t.detach().double().requires_grad_() for t in case.tensors(dtype))
    expected = outputs_and_gradients(ms_deform_attn_reference, case, exact)
    for mode in modes:
        with running(device, mode):
            actual = outputs_and_gradients(device.attention, case, case.tensors(dtype))
            assert actual["value"].dtype == actual["output"].dtype == dtype
            assert_close(actual, expected, TOLERANCES[dtype])


def describe(case: Case) -> str:
    return f"D{case.channels}-P{case.points}-L{len(case.level_shapes)}"


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=short_name)
@pytest.mark.parametrize("case", SHAPES, ids=describe)
def test_shapes(device, case, dtype):
    modes = [mode for mode in MODES if mode != "vectors" or dtype != torch.float64]
    check(device, case, dtype, modes)


@pytest.mark.parametrize(
    ("mode", "widths"), [("atomics", {1}), ("vectors", {4}), ("deterministic", set())]
)
def test_modes_take_different_ways(device, mode, widths):
    before = {count: device.additions(count) for count in (1, 4)}
    check(device, SHAPES[3], torch.float32, [mode])
    assert {count for count in before if device.additions(count) > before[count]} == widths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short_name)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_cases(device, case, dtype):
    check(device, case, dtype)


@pytest.mark.parametrize("mode", MODES)
def test_random_problems(device, mode):
    """Strides, odd addresses, NaN and infinite locations among them."""
    for number in range(15):
        with running(device, mode):
            problem = make_problem(number)
            wrong = disagreement(problem, device.attention)
            assert wrong is None, f"{problem}: {wrong}"


@pytest.mark.parametrize("mode", MODES)
def test_points_that_are_nowhere_contribute_nothing(device, mode):
    with running(device, mode):
        assert_nowhere_is_nothing(device.attention, torch.float32)
        assert_weights_do_not_matter_nowhere(device.attention, torch.float32, channels=9)
        assert_weights_do_not_matter_nowhere(device.attention, torch.float32, channels=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short_name)
@pytest.mark.parametrize("mode", MODES)
def test_points_on_pixel_centers_and_borders(device, mode, dtype):
    """In steps of a quarter pixel over the border of a level; sizes keep the numbers exact."""
    for height, width in ((1, 1), (1, 8), (4, 1), (2, 2), (4, 8)):
        x = torch.arange(-1.5, width + 1, 0.25, dtype=torch.float64)
        y = torch.arange(-1.5, height + 1, 0.25, dtype=torch.float64)
        pixels = torch.cartesian_prod(x, y)
        case = Case(
            batch=1, queries=len(pixels), heads=1, points=1, level_shapes=((height, width),)
        )
        value, _, weights = case.tensors(torch.float64)
        size = torch.tensor([width, height], dtype=torch.float64)
        locations = ((pixels + 0.5) / size).view(1, -1, 1, 1, 1, 2).requires_grad_()
        expected = outputs_and_gradients(
            ms_deform_attn_reference, case, (value, locations, weights)
        )
        # A whole pixel before the first one: grid_sample takes the slope towards it, we do not.
        expected["locations"][(pixels == -1).any(-1).view(1, -1, 1, 1, 1)] = 0
        with running(device, mode):
            inputs = (t.detach().to(dtype, copy=True) for t in (value, locations, weights))
            tensors = tuple(tensor.requires_grad_() for tensor in inputs)
            actual = outputs_and_gradients(device.attention, case, tensors)
        assert_close(actual, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("channels", [5, 32], ids=["generic", "usual"])
@pytest.mark.parametrize("mode", MODES)
def test_fewer_blocks_than_work(device, mode, channels):
    """Grids are limited by CUDA; then blocks have to take several images, heads or points."""
    case = Case(batch=5, heads=3, queries=35, channels=channels, level_shapes=LEVELS[:3])
    with contextlib.ExitStack() as limits:
        for kernel in ("forward_kernel", "backward_kernel", "gather_gradient_kernel"):
            limits.enter_context(device.grid_limit(kernel, y=2))
        limits.enter_context(device.grid_limit("list_points_kernel", x=3))
        check(device, case, torch.float32, [mode])


@pytest.mark.parametrize("images", [1, 3])
def test_offsets_beyond_32_bits(device, images):
    # 2.2e9 numbers in bf16, of which memory holds the pages that are written.
    heads, channels, width = 8, 32, 1000
    height = 2_200_000_000 // (images * heads * channels * width)
    pixels = height * width + 2
    with device.memory():
        value = torch.empty(images, pixels, heads, channels, dtype=torch.bfloat16)
        assert value.numel() > 2**31
        numbers = torch.arange(1.0, images + 1).view(-1, 1, 1)
        value[:, -1] = numbers
        # All points on the center of the last pixel of their image; together they have weight 1.
        locations = torch.tensor([1 - 0.5 / width, 1 - 0.5 / height])
        locations = locations.expand(images, 1, heads, 3, 4, 2).contiguous()
        weights = torch.zeros(images, 1, heads, 3, 4)
        weights[:, :, :, 2] = 0.25
        shapes = [(1, 1), (1, 1), (height, width)]
        output = device.attention(value, shapes, locations, weights).float()
    torch.testing.assert_close(output, numbers.expand_as(output), rtol=0.05, atol=0)


def test_too_many_levels_are_refused(device):
    case = Case(level_shapes=((1, 1),) * 65)
    with device.memory(), pytest.raises(ValueError, match="at most 64 levels"):
        outputs_and_gradients(device.attention, case, case.tensors(torch.float32))


# What lockstep/faults.cu does wrong -> what has to be noticed. In the order of its enumeration.
FAULTS = {
    "none": "",
    "exited_lane": "do not come; lane 0 at __shfl_sync .*; lane 16 has ended",
    "divergent": "do not come; lane 0 at __shfl_sync .*; lane 16 at __shfl_sync",
    "unnamed_lane": "thread 16: a lane does not name itself in __shfl_sync",
    "absent_lane": "lane 0 reads lane 16, which does not take part, by __shfl_xor_sync",
    "reads_past_end": r"block \(1, 0\), thread 63: reads 4 bytes outside of its memory",
    "writes_before_start": "thread 0: writes 4 bytes outside of its memory",
    "misaligned": "thread 1: line .*Pack.* at an address that is no multiple of 16",
    "misaligned_add": "adds to 16 bytes at an address that is no multiple of it",
    "writes_const": "writes to pointer 0, which is const",
    "two_writers": "thread 1: writes byte 0 of pointer 1, which thread 0 of block 0 wrote",
    "reads_what_other_wrote": "thread 1: reads byte 0 of pointer 1, which thread 0 .* wrote",
    "adds_and_writes": "which is added to atomically",
    "host_memory": "pointer 1 is no device memory",
    "empty_grid": "a grid that CUDA, or this program, does not launch",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(device, fault):
    with device.memory():
        numbers, output = torch.arange(128.0), torch.empty(128)
        noticed = device.commit(list(FAULTS).index(fault), numbers, output)
    if fault == "none":
        assert noticed == ""
        mirrored = numbers.view(-1, 2, 16).flip(1)  # within each warp, twice: halves are swapped
        assert torch.equal(output, mirrored.flatten())
    else:
        assert re.search(FAULTS[fault], noticed), noticed


def test_unknown_cuda_is_not_skipped():
    for source in (
        'asm volatile("mov.u32 %0, %1;" :: "r"(a), "r"(b) : "memory");',
        'asm volatile("mov.u32 %0, %1;" : "=r"(a) : "r"(b));',
        'asm("mov.u32 %0, %1;");',
        "__shared__ float sums[32];",
        "(*pointer_to_kernel)<<<1, 2>>>(a);",
    ):
        with pytest.raises(lockstep.TranslationError):
            lockstep.translate(source)


def test_translation_keeps_lines_and_operands():
    source = (
        'asm volatile(\n"{ .reg .pred p; setp.ne.s32 p, %0, 0; @!p bra END;\\n"\n'
        '"red.global.add.v4.f32 [%1], {%2, %3, %2, %3}; END: }"\n'
        ':: "r"(f(a, b)), "l"(c), "f"(d[0] * e), "f"(g)\n: "memory");\n'
        "kernel<T, 4><<<g, 2, 0, s>>>(x);"
    )
    translated = lockstep.translate(source)
    assert translated.count("\n") == source.count("\n")
    assert "const auto ptx_0 = (f(a, b));" in translated
    assert "const float four[] = {ptx_2, ptx_3, ptx_2, ptx_3};" in translated
    assert 'lockstep::on_grid("kernel", kernel<T, 4>, g, 2, 0, s)(x);' in translated
