"""From decoded queries to detections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from co_detr.errors import NonFiniteError
from co_detr.modeling.boxes import cxcywh_to_xyxy, iou, size_factor


class TopKPostprocessor(nn.Module):
    """Keeps the best (query, class) pairs of each image, without NMS (Deformable-DETR).

    Args:
        max_detections: pairs to keep per image; fewer if there are fewer.
    """

    def __init__(self, max_detections: int = 100):
        super().__init__()
        self.max_detections = max_detections

    def forward(
        self, logits: Tensor, boxes: Tensor, image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """Detects in one batch.

        Args:
            logits: ``(B, Q, K)``; boxes: ``(B, Q, 4)`` normalised; both of the last layer.
            image_sizes: un-padded (height, width) of the network input.

        Returns:
            per image ``pred_boxes`` (absolute, clipped to the image), ``scores``, ``pred_classes``,
            best first.

        Raises:
            NonFiniteError: if a box is NaN, which only broken weights or pixels give.
        """
        return best_pairs(logits, boxes, image_sizes, self.max_detections)


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

    def forward(
        self, logits: Tensor, boxes: Tensor, image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """As `TopKPostprocessor`."""
        candidates = best_pairs(logits, boxes, image_sizes, logits.shape[1])
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

    One box of every class is visited at a time, so that there are only as many steps as the most
    frequent class has boxes; only their number is waited for, no step is.
    """
    if not len(scores):
        return scores
    overlap = iou(boxes[:, None], boxes[None])  # `waiting` keeps classes apart
    if sigma is None:
        factor = torch.where(overlap >= iou_threshold, 1 - overlap, 1.0)
    else:
        factor = torch.exp(-(overlap**2) / sigma)
    _, class_index, counts = classes.unique(return_inverse=True, return_counts=True)
    waiting = scores.new_zeros(len(counts), len(scores), dtype=torch.bool)
    waiting[class_index, torch.arange(len(scores), device=scores.device)] = True
    for _ in range(int(counts.max())):
        best = torch.where(waiting, scores, -1.0).argmax(1)  # (number of classes,)
        waiting[torch.arange(len(best), device=best.device), best] = False
        # Boxes that were visited, and so classes that are through, keep their scores.
        lowered = torch.where(waiting, factor[best], 1.0).prod(0)
        scores = scores * lowered
    return scores


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


def best_pairs(
    logits: Tensor, boxes: Tensor, image_sizes: list[tuple[int, int]], number: int
) -> list[Instances]:
    """The ``number`` best (query, class) pairs of each image; see `TopKPostprocessor`."""
    pairs = choose_pairs(logits, boxes, number)
    if not pairs.boxes.isfinite().all():
        raise NonFiniteError(
            "the model predicts boxes that are NaN: its weights or the image are not finite; "
            "check train.init_checkpoint, or go back to an earlier checkpoint."
        )
    results = []
    for image, size in enumerate(image_sizes):
        chosen = pairs.boxes[image]
        absolute = Boxes(cxcywh_to_xyxy(chosen) * size_factor(size, chosen))
        absolute.clip(size)
        results.append(
            Instances(
                size,
                pred_boxes=absolute,
                scores=pairs.scores[image],
                pred_classes=pairs.labels[image],
            )
        )
    return results


def padding_mask(
    image_sizes: list[tuple[int, int]], padded: torch.Size, device: torch.device
) -> Tensor:
    """``(B, H, W)`` bool, True where a batch of shape ``(B, C, H, W)`` holds padding."""
    return outside(torch.tensor(image_sizes, device=device), padded)


def outside(sizes: Tensor, padded: torch.Size) -> Tensor:
    """`padding_mask` of image sizes ``(B, 2)`` (height, width) that are a tensor."""
    heights, widths = sizes[:, :, None, None].unbind(1)
    rows = torch.arange(padded[-2], device=sizes.device)[None, :, None]
    columns = torch.arange(padded[-1], device=sizes.device)[None, None, :]
    return (rows >= heights) | (columns >= widths)
