"""The CPU kernels, which have to be compiled again."""

from tests.mutations import Mutation

TESTS = ("tests/layers/test_ms_deform_attn_kernels.py",)
FOLDER = "co_detr/layers/csrc/ms_deform_attn"

MUTATIONS = (
    Mutation(
        "cpu-point-outside-keeps-its-weight",
        f"{FOLDER}_plan.h",
        "(column.inside & row.inside) ? attention : Vector{}",
        "attention",
        TESTS,
        rebuild=True,
    ),
    Mutation(
        "cpu-slope-without-a-lower-neighbor",
        f"{FOLDER}_plan.h",
        "inside ? (has_low ? -one : one) : zero",
        "inside ? -one : zero",
        TESTS,
        rebuild=True,
    ),
    Mutation(
        "cpu-levels-are-not-added-up",
        f"{FOLDER}_common.h",
        'pixels == sizes.pixels, "level_shapes describe "',
        'pixels <= sizes.pixels, "level_shapes describe "',
        TESTS,
        rebuild=True,
    ),
    Mutation(
        "cpu-weight-outside-reaches-the-gradient",
        f"{FOLDER}_cpu_backward.cpp",
        "slope_left[i] * slope_top[i] != T(0) ? weights[i] : T(0)",
        "weights[i]",
        TESTS,
        rebuild=True,
    ),
)
