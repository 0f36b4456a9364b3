"""Training steps on a GPU: precision, waits of the host, memory, repetition, compilation."""

import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks.step.waits import count_waits, own
from co_detr.structures import to_device
from tests.gpu.steps import (
    build,
    losses_of,
    losses_of_groups,
    pixels_to_predictions,
    step,
    training_output,
)
from tests.modeling.builders import make_batch, tiny_model

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
# Of the project's own code: to fetch the costs of matching, of every head one to choose its
# positive queries, and of a dense one another to find its positives.
MOST_WAITS = 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_and_is_close_to_float32(dtype):
    expected = step(build(CUDA))[0]
    model = build(CUDA)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16, init_scale=256.0)
    with torch.autocast("cuda", dtype):
        losses = losses_of(model)
        total = sum(losses.values())
    scaler.scale(total).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() in (1.0, 256.0)  # the step was not skipped
    moved = [
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, before[name])
    ]
    assert len(moved) > 0.9 * len(before)
    for name in ("matching.loss_cls", "matching.loss_bbox", "atss.loss_cls"):
        assert losses[name].item() == pytest.approx(expected[name], rel=0.1, abs=0.02), name
    assert losses["matching.loss_cls"].item() != expected["matching.loss_cls"]  # autocast was on


@pytest.fixture
def no_waiting():
    """From the call on, whatever makes the host wait for the device is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_no_wait_from_pixels_to_predictions(no_waiting):
    model, batch = tiny_model(2).to(CUDA), make_batch()
    pixels_to_predictions(model, batch)  # what is done once only: libraries, constants
    no_waiting()
    predictions = pixels_to_predictions(model, batch)
    torch.cuda.set_sync_debug_mode("default")
    assert predictions.boxes.isfinite().all()


def test_no_wait_in_the_criterion(no_waiting):
    model = tiny_model(2).to(CUDA)
    output = training_output(model, make_batch())
    no_waiting()
    losses = losses_of_groups(model, output)
    torch.cuda.set_sync_debug_mode("default")
    for name, value in losses.items():
        torch.testing.assert_close(value, output.losses[name], msg=name)


def test_a_step_waits_only_where_it_must():
    """As often as on an emulated GPU; see tests/modeling/test_emulated_cuda.py."""
    model = tiny_model(2).to(CUDA)
    losses_of(model)
    found = count_waits(lambda: losses_of(model), "cuda")
    assert own(found) <= MOST_WAITS, found
    assert found.total() > 0  # PyTorch still says so in the words that are looked for


def test_copies_to_the_device_do_not_wait(no_waiting):
    """Neither from memory that a loader has pinned nor from any other."""
    loader = DataLoader([torch.arange(6.0)] * 2, batch_size=None, pin_memory=True)
    plain = torch.arange(1_000_000.0)
    to_device(plain, CUDA)  # the first one sets the allocator of pinned memory up
    pinned = list(loader)
    assert all(tensor.is_pinned() for tensor in pinned)
    no_waiting()
    copies = [to_device(tensor, CUDA) for tensor in (*pinned, plain)]
    torch.cuda.set_sync_debug_mode("default")
    for copy, source in zip(copies, (*pinned, plain), strict=True):
        assert torch.equal(copy.cpu(), source)


def test_memory_of_a_step_does_not_grow():
    model = tiny_model(2).to(CUDA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    used = []
    for _ in range(8):
        optimizer.zero_grad(set_to_none=True)
        sum(losses_of(model).values()).backward()
        optimizer.step()
        used.append(torch.cuda.memory_allocated())
    assert len(set(used[2:])) == 1, used  # before, the optimizer makes its state


def test_deterministic_algorithms_repeat_their_bits(monkeypatch):
    """Without the heads of Detectron2: RoIAlign is compiled anew where it has to be repeatable."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        model = tiny_model(1).to(CUDA)
        (first, gradients), (second, again) = step(model), step(model)
    finally:
        torch.use_deterministic_algorithms(False)
    assert first == second
    for name, gradient in gradients.items():
        assert torch.equal(gradient, again[name]), name


def test_compiled_layers_train():
    overrides = ["model.encoder.num_layers=1", "model.decoder.num_layers=1"]
    expected = step(tiny_model(1, overrides).to(CUDA))[0]
    model = tiny_model(1, overrides).to(CUDA)
    model.compile_layers()
    losses, gradients = step(model)
    for name in ("matching.loss_cls", "atss.loss_cls"):
        assert losses[name] == pytest.approx(expected[name], rel=1e-2, abs=1e-3), name
    assert all(gradient.isfinite().all() for gradient in gradients.values())
