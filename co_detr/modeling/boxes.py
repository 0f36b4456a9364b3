"""Box arithmetic on tensors. Units are in the names: xyxy absolute, cxcywh normalised."""

from __future__ import annotations

import torch
from torch import Tensor

from co_detr.transfer import tensor_on


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """``(..., 4)`` centre and size -> corners, in the unit of the input."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """``(..., 4)`` corners -> centre and size, in the unit of the input."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def size_factor(image_size: tuple[int, int], like: Tensor) -> Tensor:
    """``(4,)`` = (w, h, w, h), the factor from normalised to absolute boxes."""
    height, width = image_size
    return tensor_on([width, height, width, height], like.dtype, like.device)


def size_factors(image_sizes: list[tuple[int, int]], like: Tensor) -> Tensor:
    """`size_factor` of a batch, ``(B, 4)``, in one copy."""
    rows = [(width, height, width, height) for height, width in image_sizes]
    return tensor_on(rows, like.dtype, like.device)


def normalise_boxes(xyxy: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Absolute xyxy ``(N, 4)`` -> normalised cxcywh ``(N, 4)`` of an image (height, width)."""
    return xyxy_to_cxcywh(xyxy / size_factor(image_size, xyxy))


def generalised_iou(first: Tensor, second: Tensor) -> Tensor:
    """GIoU of corner boxes, broadcast over leading dimensions: ``(..., 4), (..., 4) -> (...)``.

    Areas are bounded below by 1e-6 as in the reference (mmdet ``bbox_overlaps``), so degenerate
    boxes give a number. No assertion looks at the values: that would stall a GPU each step.
    Source: Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019.
    """
    overlap, union = _overlap_and_union(first, second)
    hull = _area(
        torch.minimum(first[..., :2], second[..., :2]),
        torch.maximum(first[..., 2:], second[..., 2:]),
    ).clamp(min=1e-6)
    return overlap / union - (hull - union) / hull


def iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of corner boxes, broadcast: ``(..., 4), (..., 4) -> (...)``; see `generalised_iou`."""
    overlap, union = _overlap_and_union(first, second)
    return overlap / union


def _overlap_and_union(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    overlap = _area(
        torch.maximum(first[..., :2], second[..., :2]),
        torch.minimum(first[..., 2:], second[..., 2:]),
    )
    areas = [_product(box[..., 2:] - box[..., :2]) for box in (first, second)]
    return overlap, (areas[0] + areas[1] - overlap).clamp(min=1e-6)


def _area(low: Tensor, high: Tensor) -> Tensor:
    return _product((high - low).clamp(min=0))


def _product(size: Tensor) -> Tensor:
    """``(..., 2) -> (...)``. Not ``prod``, whose gradient asks the device for zeros and waits."""
    return size[..., 0] * size[..., 1]


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of ``x`` with both sides of the fraction bounded below by ``eps``.

    ``x`` is clamped to [0, 1] first; this is Deformable-DETR's definition, not ``torch.logit``
    (which would clamp ``x`` itself and so cut the gradient earlier).
    """
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
