"""How detections of one image from several sources become one list.

Sources are detectors of one model, views of one image (mirrored, of other sizes, tiles) or models.

======================  ========================================================================
`NmsFusion`             the best of overlapping detections stays as it is
`SoftNmsFusion`         overlapping detections stay with lower scores
`WeightedBoxesFusion`   overlapping detections become one, whose box is their weighted mean
======================  ========================================================================

All compare detections of the same class only, and know nothing of masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor

from co_detr.errors import ConfigError
from co_detr.modeling.postprocess import SoftNMSPostprocessor

Weights = Sequence[float] | None


class Fusion(Protocol):
    """One way to make one list of several."""

    def fuse(
        self, sources: Sequence[Instances], weights: Sequence[float] | None = None
    ) -> Instances:
        """Fuses detections of one image.

        Args:
            sources: at least one; each with ``pred_boxes`` (absolute xyxy in pixels of the same
                image), ``scores`` in [0, 1] and ``pred_classes``. Other fields are left out, and
                boxes without area, too.
            weights: how much each source is trusted, above 0; None: all alike. Only ratios count.

        Returns:
            new `Instances`, best first, on the device of the sources.

        Raises:
            ConfigError: if there is no source, or the weights do not fit.
        """
        ...


@dataclass(frozen=True)
class NmsFusion:
    """Non-maximum suppression over all sources; see `Fusion`.

    The scores of a source are multiplied by its weight over the largest one.

    Attributes:
        iou_threshold: overlap from which on a detection gives way to a better one, in (0, 1].

    Raises:
        ConfigError: if the threshold is out of its range.
    """

    iou_threshold: float = 0.6

    def __post_init__(self) -> None:
        _require_share("iou_threshold", self.iou_threshold)

    def fuse(
        self, sources: Sequence[Instances], weights: Sequence[float] | None = None
    ) -> Instances:
        every = _together(sources, weights)
        kept = batched_nms(
            every.pred_boxes.tensor, every.scores, every.pred_classes, self.iou_threshold
        )
        return every[kept]


@dataclass(frozen=True)
class SoftNmsFusion:
    """Soft-NMS over all sources; see `Fusion` and `SoftNMSPostprocessor`.

    The scores of a source are multiplied by its weight over the largest one.

    Attributes:
        iou_threshold: overlap from which on the linear factor lowers scores, in (0, 1].
        sigma: None for the linear factor; of the Gaussian one, which heeds no threshold.
        min_score: detections that fall below are dropped, except for the best one.

    Raises:
        ConfigError: if a number is out of its range.
    """

    iou_threshold: float = 0.6
    sigma: float | None = None
    min_score: float = 1e-3

    def __post_init__(self) -> None:
        _require_share("iou_threshold", self.iou_threshold)
        if self.sigma is not None and not self.sigma > 0:
            raise ConfigError(f"sigma={self.sigma} of a fusion must be above 0, or null.")

    def fuse(
        self, sources: Sequence[Instances], weights: Sequence[float] | None = None
    ) -> Instances:
        every = _together(sources, weights)
        rule = SoftNMSPostprocessor(
            max(1, len(every)), self.iou_threshold, self.min_score, self.sigma
        )
        return rule.thin_out(every)


@dataclass(frozen=True)
class WeightedBoxesFusion:
    """Weighted boxes fusion; see `Fusion`.

    Detections are visited from the best weighted score down. Each joins the cluster of its class
    whose fused box it overlaps most, if by more than ``iou_threshold``, or else founds a new one.
    The fused box is the mean of its members' boxes, weighted by their weighted scores. Source:
    Solovyov, Wang and Gabruseva, "Weighted boxes fusion", Image and Vision Computing 2021;
    numbers are those of their package ``ensemble_boxes`` 1.0.9.

    Attributes:
        iou_threshold: overlap above which a detection joins a cluster, in (0, 1].
        min_score: detections below are left out before anything else.
        score: of a fused detection, ``"avg"``: the mean of its members' weighted scores, times
            the share of sources that agree, ``min(members, sources) / sum(weights)``; ``"max"``:
            the highest weighted score over the largest weight, so that a detection of a single
            source keeps its score.

    Raises:
        ConfigError: if a value is out of its range.
    """

    iou_threshold: float = 0.55
    min_score: float = 0.0
    score: str = "avg"

    def __post_init__(self) -> None:
        _require_share("iou_threshold", self.iou_threshold)
        if self.score not in ("avg", "max"):
            raise ConfigError(f'score={self.score!r} of a fusion must be "avg" or "max".')

    def fuse(
        self, sources: Sequence[Instances], weights: Sequence[float] | None = None
    ) -> Instances:
        shares = _checked_weights(sources, weights)
        lists = [_without_empty(found) for found in sources]
        lists = [found[found.scores >= self.min_score] for found in lists]
        every = Instances.cat(lists)
        # On the host and in double precision: one cluster after the other is a few numbers.
        boxes = every.pred_boxes.tensor.cpu().double().numpy()
        trust = np.repeat(np.array(shares, dtype=np.float64), [len(found) for found in lists])
        scores, labels = every.scores.cpu().double().numpy() * trust, every.pred_classes.cpu()
        clusters = [
            cluster
            for label in labels.unique().tolist()
            for cluster in self._clusters(boxes, scores, np.flatnonzero(labels.numpy() == label))
        ]
        clusters.sort(key=lambda cluster: self._score(cluster, shares), reverse=True)
        fused_boxes = np.array([cluster.box for cluster in clusters]).reshape(-1, 4)
        fused_scores = np.array([self._score(cluster, shares) for cluster in clusters])
        device = every.scores.device
        return Instances(
            every.image_size,
            pred_boxes=Boxes(torch.from_numpy(fused_boxes).to(every.pred_boxes.tensor)),
            scores=torch.from_numpy(fused_scores).to(every.scores),
            pred_classes=labels[[cluster.first for cluster in clusters]].to(device),
        )

    def _clusters(
        self, boxes: np.ndarray, scores: np.ndarray, members: np.ndarray
    ) -> list[_Cluster]:
        """The clusters of one class, whose detections are ``members``."""
        clusters: list[_Cluster] = []
        fused = np.zeros((len(members), 4))
        for index in members[np.argsort(-scores[members], kind="stable")]:
            overlaps = _overlaps(fused[: len(clusters)], boxes[index])
            best = int(overlaps.argmax()) if clusters else 0
            if clusters and overlaps[best] > self.iou_threshold:
                clusters[best].add(boxes[index], scores[index])
                fused[best] = clusters[best].box
            else:
                fused[len(clusters)] = boxes[index]
                clusters.append(_Cluster(int(index), boxes[index], scores[index]))
        return clusters

    def _score(self, cluster: _Cluster, weights: Sequence[float]) -> float:
        if self.score == "max":
            return cluster.best / max(weights)
        return cluster.total / cluster.size * min(len(weights), cluster.size) / sum(weights)


class _Cluster:
    """Detections that become one; the first of them is the best.

    Attributes:
        first: index of the best member.
        best, total: its weighted score, and the sum of those of all members.
        size: number of members.
    """

    def __init__(self, first: int, box: np.ndarray, score: float) -> None:
        self.first, self.best, self.total, self.size = first, score, score, 1
        self._only, self._sum = box, box * score

    @property
    def box(self) -> np.ndarray:
        """``(4,)``, the weighted mean; exactly that of the only member."""
        return self._only if self.size == 1 else self._sum / self.total

    def add(self, box: np.ndarray, score: float) -> None:
        self.total, self.size = self.total + score, self.size + 1
        self._sum = self._sum + box * score


def boxes_only(found: Instances) -> Instances:
    """A copy of detections without their masks, scores in float32 at least."""
    return Instances(
        found.image_size,
        pred_boxes=found.pred_boxes.clone(),
        scores=full_precision(found.scores),
        pred_classes=found.pred_classes,
    )


def full_precision(values: Tensor) -> Tensor:
    """In float32 at least: heads may run in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _without_empty(found: Instances) -> Instances:
    """Without boxes that clipping to the image left nothing of, which count as no detections."""
    found = boxes_only(found)
    return found[found.pred_boxes.nonempty()]


def _together(sources: Sequence[Instances], weights: Weights) -> Instances:
    """All detections in one list, scores times the weights, of which the largest counts as 1."""
    shares = _checked_weights(sources, weights)
    lists = [_without_empty(found) for found in sources]
    for found, share in zip(lists, shares, strict=True):
        if share != max(shares):
            found.scores = found.scores * (share / max(shares))
    return Instances.cat(lists)


def _checked_weights(sources: Sequence[Instances], weights: Weights) -> Sequence[float]:
    if not sources:
        raise ConfigError("there is nothing to fuse: give at least one source of detections.")
    if weights is None:
        return [1.0] * len(sources)
    if len(weights) != len(sources):
        raise ConfigError(
            f"{len(weights)} weights are given for {len(sources)} sources of detections: give one "
            "for each."
        )
    if not all(0 < weight < float("inf") for weight in weights):
        raise ConfigError(f"the weights {list(weights)} of sources must all be above 0 and finite.")
    return list(weights)


def _require_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ConfigError(f"{name}={value} of a fusion must be above 0 and at most 1.")


def _overlaps(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """IoU ``(N,)`` of corner boxes ``(N, 4)`` with one, all with an area."""
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    common = sides.clip(min=0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
    return common / (areas - common)
