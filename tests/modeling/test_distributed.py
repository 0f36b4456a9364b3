"""Two processes, each with a part of the images, equal one process with all of them."""

import pytest
import torch

from tests.engine.processes import run_two
from tests.modeling.distributed_worker import NUM_GTS, batch_of, build, save_results, step

pytestmark = pytest.mark.cpu_only("two processes: NCCL wants a card for each, see tests/gpu")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Losses (mean over processes) and gradients by number of heads and case."""
    output = tmp_path_factory.mktemp("distributed") / "results.pt"
    run_two(save_results, str(output))
    return torch.load(output)


@pytest.mark.slow
@pytest.mark.parametrize("case", NUM_GTS)
@pytest.mark.parametrize("heads", [0, 1, 6])
def test_two_gloo_processes_equal_one(two_processes, heads, case):
    """K = 0, K = 1 with ATSS, K = 4 with RetinaNet, FCOS, PAA and GFL; masked padding.

    The Faster R-CNN head is not part of this: Detectron2 samples anchors and proposals of an
    image at random, with draws that depend on what the process drew before, so that a process
    and the joined batch agree in expectation only.
    """
    model = build(heads)
    expected = step(model, batch_of(case))
    actual = two_processes[heads, case]
    assert actual["losses"].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual["losses"][name].double(), value.double(), rtol=1e-6, atol=1e-8, msg=name
        )
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(
            actual["gradients"][name], parameter.grad, rtol=0, atol=1e-5 * scale + 1e-9, msg=name
        )
    assert expected["matching.loss_bbox"] > 0
