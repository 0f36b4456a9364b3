"""From decoded queries to detections."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from co_detr.errors import NonFiniteError
from co_detr.modeling.geometry import Geometry
from co_detr.modeling.losses import cxcywh_to_xyxy, iou
from co_detr.transfer import to_device


class TopKPostprocessor(nn.Module):
    """Keeps the best (query, class) pairs of each image, without NMS (Deformable-DETR).

    Args:
        max_detections: pairs to keep per image; fewer if there are fewer.
    """

    def __init__(self, max_detections: int = 100):
        super().__init__()
        self.max_detections = max_detections

    def forward(self, logits: Tensor, boxes: Tensor, geometry: Geometry) -> list[Instances]:
        """Detects in one batch.

        Args:
            logits: ``(B, Q, K)``; boxes: ``(B, Q, 4)`` normalised; both of the last layer.
            geometry: sizes of the images.

        Returns:
            per image ``pred_boxes`` (absolute, clipped to the image), ``scores``, ``pred_classes``,
            best first.

        Raises:
            NonFiniteError: if a box is NaN, which only broken weights or pixels give.
        """
        return best_pairs(logits, boxes, geometry, self.max_detections)


class SoftNMSPostprocessor(nn.Module):
    """The best (query, class) pairs, thinned out by soft-NMS within every class.

    Pairs are visited from the best score down; each lowers the scores of all later pairs of its
    class that overlap it by at least ``iou_threshold`` by the factor (1 - IoU), or, with ``sigma``,
    those of all later pairs of its class by exp(-IoU^2 / sigma).
    Source: Bodla et al., "Soft-NMS", ICCV 2017; mmcv ``soft_nms``; the reference's Co-DINO, which
    starts from as many pairs as it has queries.

    Args:
        max_detections: detections to keep per image.
        min_score: pairs that fall below are dropped, except for the best one.
        sigma: None for the linear factor; 0.5 in the paper for the Gaussian one, which heeds no
            threshold.
    """

    def __init__(
        self,
        max_detections: int = 300,
        iou_threshold: float = 0.8,
        min_score: float = 1e-3,
        sigma: float | None = None,
    ):
        super().__init__()
        self.max_detections = max_detections
        self.iou_threshold = iou_threshold
        self.min_score = min_score
        self.sigma = sigma

    def forward(self, logits: Tensor, boxes: Tensor, geometry: Geometry) -> list[Instances]:
        """As `TopKPostprocessor`."""
        candidates = best_pairs(logits, boxes, geometry, logits.shape[1])
        return [self.thin_out(each) for each in candidates]

    def thin_out(self, found: Instances) -> Instances:
        """The detections that stay, with lowered scores, best first."""
        if len(found) == 0:
            return found
        boxes, classes = found.pred_boxes.tensor, found.pred_classes
        scores = soft_nms(boxes, found.scores, classes, self.iou_threshold, self.sigma)
        order = scores.argsort(descending=True, stable=True)
        scores = scores[order]
        keep = scores >= self.min_score
        keep[0] = True
        kept = order[keep][: self.max_detections]
        result = found[kept]
        result.scores = scores[keep][: self.max_detections]
        return result


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    iou_threshold: float,
    sigma: float | None = None,
) -> Tensor:
    """Scores ``(N,)`` after soft-NMS of absolute xyxy boxes ``(N, 4)`` within classes.

    See `SoftNMSPostprocessor` for the other arguments.

    Only boxes that lower another one's score, or are lowered, have to be visited. They fall apart
    into clusters that do not touch each other; of each cluster one box is visited at a time, for
    all clusters together. This is done on the host, which gets the boxes that matter in one piece:
    on a GPU every visit would be half a dozen kernels for a few numbers.
    """
    if not len(scores):
        return scores
    overlap = iou(boxes[:, None], boxes[None])
    if sigma is None:
        factor = torch.where(overlap >= iou_threshold, 1 - overlap, 1.0)
    else:
        factor = torch.exp(-(overlap**2) / sigma)
    factor = torch.where(classes[:, None] == classes, factor, 1.0).fill_diagonal_(1.0)
    touched = (factor != 1).any(1).nonzero().squeeze(1)
    if not len(touched):
        return scores
    block = torch.cat([scores[touched, None].to(factor.dtype), factor[touched][:, touched]], dim=1)
    block = block.cpu().numpy()
    lowered = to_device(torch.from_numpy(_visit_clusters(block[:, 0], block[:, 1:])), scores.device)
    return scores.scatter(0, touched, lowered.to(scores.dtype))


def _visit_clusters(scores: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Soft-NMS of M boxes: scores ``(M,)`` and what a visit of box i makes of j, ``(M, M)``."""
    number, cluster = connected_components(factor != 1)
    # (clusters, boxes of the largest one), filled up with the index behind the last box
    order = np.argsort(cluster, kind="stable")
    sizes = np.bincount(cluster, minlength=number)
    members = np.full((number, sizes.max()), len(scores))
    slot = np.arange(len(scores)) - np.repeat(sizes.cumsum() - sizes, sizes)
    members[cluster[order], slot] = order
    factor = np.pad(factor, (0, 1), constant_values=1)
    scores = np.append(scores, -1).astype(scores.dtype)
    waiting = members < len(scores) - 1
    for _ in range(members.shape[1]):
        best = np.where(waiting, scores[members], -1).argmax(1)  # (clusters,)
        waiting[np.arange(number), best] = False
        visited = members[np.arange(number), best]
        # Boxes that were visited, and so clusters that are through, keep their scores.
        lowered = np.where(waiting, factor[visited[:, None], members], 1)
        scores[members] = scores[members] * lowered
    return scores[:-1]


@dataclass(frozen=True)
class Pairs:
    """Chosen (query, class) pairs of a batch, best first.

    Attributes:
        boxes: ``(B, N, 4)`` normalised; scores: ``(B, N)``; labels: ``(B, N)`` int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def choose_pairs(logits: Tensor, boxes: Tensor, number: int) -> Pairs:
    """The ``number`` best pairs, or all if there are fewer; see `TopKPostprocessor`."""
    num_classes = logits.shape[-1]
    scores = logits.float().sigmoid().flatten(1)
    scores, pairs = scores.topk(min(number, scores.shape[1]), dim=1)
    queries = pairs // num_classes
    chosen = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
    return Pairs(chosen, scores, pairs % num_classes)


def best_pairs(logits: Tensor, boxes: Tensor, geometry: Geometry, number: int) -> list[Instances]:
    """The ``number`` best (query, class) pairs of each image; see `TopKPostprocessor`."""
    pairs = choose_pairs(logits, boxes, number)
    require_finite(pairs.boxes)
    return [
        Instances(
            size,
            pred_boxes=absolute_boxes(pairs.boxes[image], geometry.factors[image], size),
            scores=pairs.scores[image],
            pred_classes=pairs.labels[image],
        )
        for image, size in enumerate(geometry.image_sizes)
    ]


def require_finite(boxes: Tensor) -> None:
    """Raises a NonFiniteError if a predicted box is NaN or infinite."""
    if not boxes.isfinite().all():
        raise NonFiniteError(
            "the model predicts boxes that are NaN: its weights or the image are not finite; "
            "check train.init_checkpoint, or go back to an earlier checkpoint."
        )


def absolute_boxes(boxes: Tensor, factor: Tensor, image_size: tuple[int, int]) -> Boxes:
    """Normalised cxcywh ``(N, 4)`` -> absolute, clipped to the image (height, width).

    Args:
        factor: of the image, see `Geometry.factors`.
    """
    absolute = Boxes(cxcywh_to_xyxy(boxes) * factor.to(boxes.dtype))
    absolute.clip(image_size)
    return absolute
