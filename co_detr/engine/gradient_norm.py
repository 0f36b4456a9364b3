"""`torch.nn.utils.clip_grad_norm_` in two steps, so that a NaN can be looked for in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """L2 norm over all gradients, a scalar; the gradients stay as they are."""
    gradients = [each.grad for each in parameters if each.grad is not None]
    if hasattr(nn.utils, "get_total_norm"):
        return nn.utils.get_total_norm(gradients)
    # torch before 2.6
    if not gradients:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))


def clip_gradient(parameters: Sequence[nn.Parameter], max_norm: float | None, norm: Tensor) -> None:
    """Scales all gradients so that their norm, which is `norm`, is at most `max_norm`.

    With None, does nothing.
    """
    if max_norm is None:
        return
    if hasattr(nn.utils, "clip_grads_with_norm_"):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    else:  # torch before 2.6
        nn.utils.clip_grad_norm_(parameters, max_norm)
