"""Measuring and clipping in two steps equals PyTorch's one step, also for PyTorch before 2.6."""

import copy

import pytest
import torch
from torch import nn

from co_detr.engine.trainer import clip_gradient, gradient_norm
from tests.device import DEVICE

NEWER = ("get_total_norm", "clip_grads_with_norm_")


@pytest.fixture(params=["as installed", "before 2.6"])
def torch_version(request, monkeypatch):
    if request.param == "before 2.6":
        for name in NEWER:
            monkeypatch.delattr(nn.utils, name, raising=False)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2)).to(DEVICE)
    model[:2](torch.randn(5, 4)).square().sum().backward()  # the last layer has no gradient
    return model


def gradients(model):
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("max_norm", [None, 0.1, 1e9])
def test_equals_clip_grad_norm(torch_version, model, max_norm):
    expected = copy.deepcopy(model)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        theirs.grad = None if ours.grad is None else ours.grad.clone()
    limit = float("inf") if max_norm is None else max_norm
    expected_norm = nn.utils.clip_grad_norm_(expected.parameters(), limit)
    before = [gradient.clone() for gradient in gradients(model)]

    norm = gradient_norm(list(model.parameters()))
    torch.testing.assert_close(norm, expected_norm)
    torch.testing.assert_close(gradients(model), before, rtol=0, atol=0)  # measured only
    clip_gradient(list(model.parameters()), max_norm, norm)
    torch.testing.assert_close(gradients(model), gradients(expected))
    assert len(gradients(model)) == 4


def test_no_gradient_at_all(torch_version):
    assert gradient_norm(list(nn.Linear(2, 2).parameters())) == 0


def test_a_nan_is_measured_without_spreading(torch_version, model):
    model[0].weight.grad[0, 0] = float("nan")
    assert gradient_norm(list(model.parameters())).isnan()
    assert sum(int(gradient.isnan().sum()) for gradient in gradients(model)) == 1
