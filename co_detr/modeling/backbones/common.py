"""What the backbones share: initial weights and stochastic depth."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.ops import StochasticDepth


def init_transformer(module: nn.Module) -> None:
    """For ``Module.apply``: linear layers from a truncated normal of deviation 0.02, no bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_paths(drop_path_rate: float, depth: int) -> list[StochasticDepth]:
    """One drop path per block; the rate grows linearly from 0 to ``drop_path_rate``.

    A drop path removes, in training, a residual branch of an image with its rate as probability,
    and scales the branch up where it stays.
    """
    # On the CPU by name: values are read, which a model built on the meta device cannot do.
    rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
    return [StochasticDepth(rate, "row") for rate in rates]
