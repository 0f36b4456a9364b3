"""The classification losses at the size of large vocabularies: the same numbers in less memory."""

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from co_detr.modeling import losses
from co_detr.modeling.losses import FocalLoss, QualityFocalLoss

SHAPE, K = (2, 30), 7


def problem(dtype=torch.float64, num_classes=K):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(*SHAPE, num_classes, generator=generator, dtype=dtype)
    labels = torch.randint(0, num_classes + 1, SHAPE, generator=generator)
    quality = torch.rand(SHAPE, generator=generator, dtype=dtype)
    return logits.requires_grad_(), labels, quality


def expected_loss(loss, logits, labels, quality):
    """Written out over a whole one-hot target."""
    target = F.one_hot(labels, K + 1)[..., :K].to(logits.dtype)
    if isinstance(loss, FocalLoss):
        return sigmoid_focal_loss(logits, target, loss.alpha, loss.gamma).sum(-1)
    target = target * quality[..., None]
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (entropy * (target - logits.sigmoid()).abs() ** loss.beta).sum(-1)


@pytest.mark.parametrize("max_logits", [1 << 22, 5 * K, K, 1])
@pytest.mark.parametrize("loss", [FocalLoss(), QualityFocalLoss()], ids=lambda x: type(x).__name__)
def test_parts_give_the_same_losses_and_gradients(loss, max_logits, monkeypatch):
    monkeypatch.setattr(losses, "MAX_LOGITS", max_logits)
    logits, labels, quality = problem()
    weights = torch.rand(SHAPE, dtype=torch.float64)
    expected = expected_loss(loss, logits, labels, quality)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), logits)
    found = loss(logits, labels, quality)
    # fvcore computes in float32; vector instructions and their tails round differently.
    tolerance = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(found, expected, **tolerance)
    (grad,) = torch.autograd.grad((found * weights).sum(), logits)
    torch.testing.assert_close(grad, expected_grad, **tolerance)


class Sizes(TorchDispatchMode):
    """The largest tensor that an operator makes, and the integer ones."""

    def __init__(self):
        super().__init__()
        self.numbers, self.integers = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, torch.Tensor):
                self.numbers.append(leaf.numel())
                if leaf.dtype == torch.int64:
                    self.integers.append(leaf.numel())
        return result


@pytest.mark.parametrize("loss", [FocalLoss(), QualityFocalLoss()], ids=lambda x: type(x).__name__)
def test_many_classes_take_no_memory_beyond_the_gradient(loss, monkeypatch):
    monkeypatch.setattr(losses, "MAX_LOGITS", 3000)
    logits, labels, quality = problem(torch.float32, num_classes=1000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        with Sizes() as forward:
            total = loss(logits, labels, quality).sum()
    # For the backward pass nothing is kept but what was there before.
    owned = [
        tensor
        for tensor in kept
        if tensor.data_ptr() not in (logits.data_ptr(), quality.data_ptr())
    ]
    assert sum(tensor.numel() for tensor in owned) <= 4 * labels.numel()
    assert max(size for size in forward.numbers if size != logits.numel()) <= 3000
    assert max(forward.integers) <= labels.numel()
    with Sizes() as backward:
        total.backward()
    whole = [size for size in backward.numbers if size > 3000]
    assert set(whole) == {logits.numel()}
