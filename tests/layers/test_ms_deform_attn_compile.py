"""``torch.compile`` of a module around the operator: one graph, forward and backward."""

import pytest
import torch

from co_detr.layers import MultiScaleDeformableAttention
from co_detr.layers.deformable_attention import KERNEL_DEVICES
from tests.layers.cases import Case

CASE = Case()
SHAPES = list(CASE.level_shapes)
PIXELS = sum(height * width for height, width in SHAPES)


@pytest.mark.skipif("cpu" not in KERNEL_DEVICES, reason="co_detr was installed without kernels")
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
def test_module_compiles_into_one_graph(autocast):
    torch.manual_seed(0)
    module = MultiScaleDeformableAttention(16, num_heads=2, num_levels=3, num_points=4)
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    inputs = (torch.randn(2, 7, 16), torch.randn(2, PIXELS, 16))
    reference = torch.rand(2, 7, 3, 2)

    def results(function) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = function(*leaves, reference, SHAPES)
        leaves += module.parameters()
        return [output, *torch.autograd.grad(output.float().square().sum(), leaves)]

    for actual, expected in zip(results(compiled), results(module), strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
