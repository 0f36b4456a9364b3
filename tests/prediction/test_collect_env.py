"""``python -m co_detr.tools.collect_env`` checks the backends by running them."""

import torch

from co_detr.layers import ms_deform_attn_reference
from co_detr.layers.deformable_attention import KERNEL_DEVICES
from co_detr.tools import collect_env


def test_report_names_everything():
    report = collect_env.collect()
    assert report["torch"].startswith(torch.__version__)
    assert "works" in report["MSDeformAttn, reference"]
    assert ("works" in report["MSDeformAttn, CPU kernel"]) == ("cpu" in KERNEL_DEVICES)
    assert {"detectron2", "C++ compiler", "CUDA toolkit", "MSDeformAttn, CUDA kernel"} <= set(
        report
    )


def test_a_wrong_or_failing_backend_is_reported():
    def wrong(value, level_shapes, locations, weights):
        return ms_deform_attn_reference(value, level_shapes, locations, weights) * 1.01

    def failing(*arguments):
        raise RuntimeError("no kernel image is available\nand more")

    assert collect_env.check_backend(wrong, "cpu").startswith("WRONG")
    assert collect_env.check_backend(failing, "cpu") == "FAILS: no kernel image is available"
