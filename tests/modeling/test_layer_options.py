"""Checkpointed and compiled layers compute what plain ones do."""

import pytest
import torch

from co_detr.modeling import transformer
from tests.modeling.builders import detect, make_batch, randomize, tiny_model, train_step


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model, other, batch, **tolerance):
    losses, other_losses = train_step(model, batch), train_step(other, batch)
    torch.testing.assert_close(losses, other_losses, **tolerance)
    torch.testing.assert_close(gradients(model), gradients(other), **tolerance)


@pytest.mark.cpu_only("RoIAlign would be compiled to repeat its bits; tests/gpu asks for them")
@pytest.mark.parametrize("heads", [0, 2])
def test_encoder_checkpointing_changes_no_bit(heads, monkeypatch):
    plain, checkpointed = (
        tiny_model(heads, [f"model.encoder.activation_checkpointing={switch}"])
        for switch in ("false", "true")
    )
    calls = []
    original = transformer.checkpoint
    monkeypatch.setattr(
        transformer, "checkpoint", lambda *args, **kw: calls.append(1) or original(*args, **kw)
    )
    batch = make_batch()
    assert_same_step(plain, checkpointed, batch, rtol=0, atol=0)
    assert len(calls) == len(plain.encoder.layers)  # the plain one never got there
    detect(checkpointed, batch)
    assert len(calls) == len(plain.encoder.layers)  # nothing to save without gradients


@pytest.mark.slow
@pytest.mark.cpu_only("tests/gpu compiles for a card; a mode of the tests would be traced, too")
def test_compiled_layers_are_one_graph_each():
    plain, compiled = tiny_model(1), tiny_model(1)
    randomize(plain), randomize(compiled)
    # Traces like the default back end, without generating code; an error at any graph break.
    compiled.compile_layers(backend="aot_eager", fullgraph=True)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    for sizes in (((96, 128), (80, 112)), ((128, 96), (64, 96))):
        assert_same_step(plain, compiled, make_batch(sizes), rtol=1e-4, atol=1e-5)
