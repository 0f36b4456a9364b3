"""Many small one-dimensional mixtures of two Gaussians, fitted together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LOG_2_PI = math.log(2 * math.pi)
_LOOK_EVERY = 8  # iterations; most mixtures take five to twenty


@dataclass(frozen=True)
class GaussianMixtures:
    """G mixtures of two components: ``weights``, ``means`` and ``variances``, each ``(G, 2)``."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def log_densities(self, values: Tensor) -> Tensor:
        """Weighted log density of both components at ``(G, N)`` values: ``(G, N, 2)``."""
        distance = (values[..., None] - self.means[:, None]).square() / self.variances[:, None]
        scale = self.weights.log() - 0.5 * (self.variances.log() + _LOG_2_PI)
        return scale[:, None] - 0.5 * distance


def fit_mixtures(
    values: Tensor,
    valid: Tensor,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
    smallest_variance: float = 1e-6,
) -> GaussianMixtures:
    """Expectation maximisation from the smallest and the largest value as means.

    A mixture is done when its mean log likelihood changes by less than ``tolerance``; these are
    the steps and the defaults of scikit-learn's ``GaussianMixture``, which PAA uses.

    Args:
        values: ``(G, N)``, rows padded with anything finite.
        valid: ``(G, N)`` bool, False for padding; at least one True in each row.
    """
    values = values.double()
    first = torch.where(valid, values, math.inf).amin(1)
    last = torch.where(valid, values, -math.inf).amax(1)
    means = torch.stack([first, last], dim=1)
    fitted = GaussianMixtures(torch.full_like(means, 0.5), means, torch.ones_like(means))
    count = valid.sum(1)  # (G,)
    bound = torch.full_like(first, -math.inf)
    running = torch.ones_like(first, dtype=torch.bool)
    for iteration in range(max_iterations):
        parts = fitted.log_densities(values)  # (G, N, 2)
        total = parts.logsumexp(-1)
        shares = (parts - total[..., None]).exp() * valid[..., None]
        fitted = _maximise(fitted, running[:, None], values, shares, smallest_variance)
        previous, bound = bound, (total * valid).sum(1) / count
        running = running & ((bound - previous).abs() >= tolerance)
        # A mixture that is done stays as it is, so looking now and then, which makes the host wait
        # for the device, gives the same result.
        if iteration % _LOOK_EVERY == _LOOK_EVERY - 1 and not running.any():
            break
    return fitted


def _maximise(
    fitted: GaussianMixtures,
    running: Tensor,
    values: Tensor,
    shares: Tensor,
    smallest_variance: float,
) -> GaussianMixtures:
    """Weighted moments, ``shares (G, N, 2)`` as weights, of the mixtures that still run."""
    # A component may lose all its values.
    mass = shares.sum(1) + 10 * torch.finfo(values.dtype).eps  # (G, 2)
    means = (shares * values[..., None]).sum(1) / mass
    distance = (values[..., None] - means[:, None]).square()
    variances = (shares * distance).sum(1) / mass + smallest_variance
    return GaussianMixtures(
        torch.where(running, mass / mass.sum(1, keepdim=True), fitted.weights),
        torch.where(running, means, fitted.means),
        torch.where(running, variances, fitted.variances),
    )
