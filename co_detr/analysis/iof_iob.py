"""IoF-IoB curves: how well a score map tells objects from background (Co-DETR section 3.4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NUM_STEPS = 4000


@dataclass(frozen=True)
class Curve:
    """Shares of the foreground and of the background whose score reaches a threshold.

    Attributes:
        iof, iob: ``(T,)`` at thresholds from 0, where all is in, to 1, and one beyond, where
            nothing is.
    """

    iof: np.ndarray
    iob: np.ndarray

    @property
    def auc(self) -> float:
        """Area under IoF over IoB, by trapezoids: 1 is perfect, 0.5 chance.

        For one image it is the probability that a foreground pixel scores higher than a background
        pixel, ties counting half. A constant map thus has 0.5.
        """
        heights = (self.iof[1:] + self.iof[:-1]) / 2
        return float((heights * -np.diff(self.iob)).sum())


def thresholds(device: torch.device | None = None) -> Tensor:
    """``(T - 1,)`` float64 from 0 to 1, without the one that no score reaches.

    They are dense at both ends: attention is near 0 almost everywhere, and norms of features that
    a layer norm made are all near their maximum.
    """
    share = torch.arange(NUM_STEPS + 1, dtype=torch.float64, device=device) / NUM_STEPS
    low, high = share**3, (1 - share) ** 3
    return low / (low + high)


def foreground_mask(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """``(H, W)`` bool: pixels whose centre lies in a box, ``(G, 4)`` absolute xyxy."""
    y = torch.arange(size[0], device=boxes.device, dtype=boxes.dtype) + 0.5
    x = torch.arange(size[1], device=boxes.device, dtype=boxes.dtype) + 0.5
    in_rows = (y >= boxes[:, 1, None]) & (y < boxes[:, 3, None])  # (G, H)
    in_columns = (x >= boxes[:, 0, None]) & (x < boxes[:, 2, None])  # (G, W)
    # Box by box would take G maps; as a product of matrices it takes one.
    return (in_rows.float().T @ in_columns.float()) > 0


def image_curve(scores: Tensor, foreground: Tensor) -> Curve:
    """Curve of one image.

    Args:
        scores: ``(H, W)`` in [0, 1]; foreground: ``(H, W)`` bool with both values.
    """
    return Curve(_reached(scores[foreground]), _reached(scores[~foreground]))


def _reached(scores: Tensor) -> np.ndarray:
    """Share of the scores at or above each threshold, ``(T,)``."""
    steps = thresholds(scores.device)
    below = torch.bucketize(scores.double(), steps, right=True)  # how many thresholds it reaches
    counts = torch.bincount(below, minlength=len(steps) + 1).cpu().numpy()
    at_least = counts[::-1].cumsum()[::-1] / counts.sum()
    return np.append(at_least[1:], 0.0)


class MeanCurve:
    """Mean over images of IoF and of IoB at the same thresholds.

    The mean over images, and not over all pixels, so that every image counts alike whatever its
    size and that of its objects; the paper does not say which.
    """

    def __init__(self) -> None:
        self.image_aucs: list[float] = []  # areas under the images' own curves
        self._iof = self._iob = 0.0

    def add(self, scores: Tensor, foreground: Tensor) -> None:
        """Adds an image that `has_curve`; see `image_curve`."""
        curve = image_curve(scores, foreground)
        self.image_aucs.append(curve.auc)
        self._iof = self._iof + curve.iof
        self._iob = self._iob + curve.iob

    @property
    def curve(self) -> Curve:
        """Needs an image."""
        return Curve(self._iof / len(self.image_aucs), self._iob / len(self.image_aucs))

    def summary(self) -> dict[str, float | None]:
        """What the report's JSON file says about it."""
        aucs = np.array(self.image_aucs)
        error = None  # unknown from a single image
        if len(aucs) > 1:
            error = float(aucs.std(ddof=1) / len(aucs) ** 0.5)
        return {
            "auc": self.curve.auc,
            "image_auc_mean": float(aucs.mean()),
            "image_auc_standard_error": error,
        }


def has_curve(foreground: Tensor) -> bool:
    """Whether an image has both objects and background, without which there is no curve."""
    return bool(foreground.any()) and not bool(foreground.all())
