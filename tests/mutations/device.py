"""The CUDA kernels and their host code: what the tests in lock step have to notice."""

from tests.mutations import Mutation

TESTS = ("tests/layers/test_ms_deform_attn_lockstep.py",)
FOLDER = "co_detr/layers/csrc/ms_deform_attn_cuda"


def _mutation(name: str, part: str, old: str, new: str) -> Mutation:
    return Mutation(name, f"{FOLDER}{part}", old, new, TESTS)


MUTATIONS = (
    # Points
    _mutation(
        "patch-leaves-its-level",
        "_device.h",
        "fmax(size - A(2), A(0))",
        "fmax(size - A(1), A(0))",
    ),
    _mutation(
        "slope-behind-the-last-pixel",
        "_device.h",
        "(ahead < A(1) ? A(1) : A(-1))",
        "A(1)",
    ),
    _mutation(
        "inside-below-the-level",
        "_device.h",
        "y > A(-1) && y < height",
        "y > A(-1)",
    ),
    _mutation(
        "weight-of-points-outside-counts",
        "_device.h",
        "inside ? weight : A(0)",
        "weight",
    ),
    # Who works on what
    _mutation(
        "one-query-too-many",
        "_device.h",
        "active = wanted < problem.queries;",
        "active = wanted <= problem.queries;",
    ),
    _mutation(
        "vectors-that-do-not-fit",
        "_device.h",
        "problem.channels % count == 0",
        "problem.channels >= count",
    ),
    _mutation(
        "offset-in-32-bits",
        "_device.h",
        "static_cast<uint64_t>(pixel) * pixel_bytes",
        "static_cast<uint64_t>(pixel * pixel_bytes)",
    ),
    _mutation(
        "pixel-from-another-row",
        "_device.h",
        "__shfl_sync(whole_warp, pixel, lane, lanes)",
        "__shfl_sync(whole_warp, pixel, lane)",
    ),
    # Output
    _mutation(
        "idle-lanes-write-the-output",
        "_forward.cu",
        "if (work.active && has_channel) {",
        "if (has_channel) {",
    ),
    _mutation(
        "blocks-repeat-images",
        "_forward.cu",
        "image += gridDim.y",
        "image += 1",
    ),
    _mutation(
        "points-after-the-last",
        "_forward.cu",
        "min(group + work.lane, all_points - 1)",
        "group + work.lane",
    ),
    # Gradients
    _mutation(
        "idle-lanes-write-gradients",
        "_backward.cu",
        "if (work.active && owns) {",
        "if (owns) {",
    ),
    _mutation(
        "idle-lanes-add",
        "_backward.cu",
        "work.active && grad_value != nullptr",
        "grad_value != nullptr",
    ),
    _mutation(
        "lanes-leave-before-the-shuffle",
        "_backward.cu",
        "if (!work.whole_groups && group + i >= all_points) {",
        "if (group + work.lane >= all_points) {",
    ),
    _mutation(
        "sums-end-in-the-wrong-lane",
        "_backward.cu",
        "keeps_upper = lane & half",
        "keeps_upper = lane & 1",
    ),
    _mutation(
        "ptx-operands-swapped",
        "_backward.cu",
        "{%9, %10, %11, %12}",
        "{%9, %10, %12, %11}",
    ),
    # Deterministic mode
    _mutation(
        "rows-part-before-the-shuffle",
        "_deterministic.cu",
        "__any_sync(whole_warp, next < end)",
        "next < end",
    ),
    _mutation(
        "level-one-pixel-wide",
        "_deterministic.cu",
        "min(x, max(level.width - 2, 0)) + 1",
        "min(x, level.width - 2) + 1",
    ),
    _mutation(
        "heads-of-the-first-turn-again",
        "_deterministic.cu",
        "first_pair + i / pair_points",
        "i / pair_points",
    ),
    # Host
    _mutation(
        "gradient-in-half-the-space",
        ".cpp",
        "problem.pixel_bytes * (element_size == 2 ? 2 : 1)",
        "problem.pixel_bytes",
    ),
    _mutation(
        "odd-addresses-are-kept",
        ".cpp",
        "% 16 == 0 ? result : copy_of(result)",
        "% 4 == 0 ? result : copy_of(result)",
    ),
)
