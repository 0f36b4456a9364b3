"""From decoded queries to detections, and from those of the network input to those of the image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances, ROIMasks
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from co_detr.errors import ConfigError, NonFiniteError, require_share, require_whole
from co_detr.mask_patch import MaskPatch
from co_detr.modeling.geometry import Geometry
from co_detr.modeling.losses import cxcywh_to_xyxy, iou
from co_detr.structures import to_device


class TopKPostprocessor(nn.Module):
    """Keeps the best (query, class) pairs of each image, without NMS (Deformable-DETR).

    Args:
        max_detections: pairs to keep per image; fewer if there are fewer.

    Raises:
        ConfigError: if it is no whole number of at least 1.
    """

    def __init__(self, max_detections: int = 100):
        super().__init__()
        require_whole("model.postprocessor.max_detections", max_detections)
        self.max_detections = max_detections

    def forward(self, logits: Tensor, boxes: Tensor, geometry: Geometry) -> list[Instances]:
        """Detects in one batch.

        Args:
            logits: ``(B, Q, K)``; boxes: ``(B, Q, 4)`` normalized; both of the last layer.
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

    Raises:
        ConfigError: if a number is out of its range.
    """

    def __init__(
        self,
        max_detections: int = 300,
        iou_threshold: float = 0.8,
        min_score: float = 1e-3,
        sigma: float | None = None,
    ):
        super().__init__()
        require_whole("model.postprocessor.max_detections", max_detections)
        require_share("model.postprocessor.iou_threshold", iou_threshold)
        require_share("model.postprocessor.min_score", min_score)
        if sigma is not None and not sigma > 0:
            raise ConfigError(f"model.postprocessor.sigma={sigma} must be above 0, or null.")
        self.max_detections = max_detections
        self.iou_threshold = iou_threshold
        self.min_score = min_score
        self.sigma = sigma

    def forward(self, logits: Tensor, boxes: Tensor, geometry: Geometry) -> list[Instances]:
        """As `TopKPostprocessor`."""
        candidates = best_pairs(logits, boxes, geometry, logits.shape[1])
        return [self.thin_out(pairs) for pairs in candidates]

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
        boxes: ``(B, N, 4)`` normalized; scores: ``(B, N)``; labels: ``(B, N)`` int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def absolute(self, geometry: Geometry) -> Tensor:
        """Boxes ``(B, N, 4)`` xyxy in pixels, clipped to the images; NaN stays NaN."""
        # Half precision would move boxes by pixels.
        boxes = self.boxes.to(torch.promote_types(self.boxes.dtype, torch.float32))
        limits = geometry.factors[:, None].to(boxes.dtype)
        return torch.minimum((cxcywh_to_xyxy(boxes) * limits).clamp(min=0), limits)


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
    boxes = pairs.absolute(geometry)
    return [
        Instances(
            size,
            pred_boxes=Boxes(boxes[image]),
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
    """Normalized cxcywh ``(N, 4)`` -> absolute, clipped to the image (height, width).

    Args:
        factor: of the image, see `Geometry.factors`.
    """
    absolute = Boxes(cxcywh_to_xyxy(boxes) * factor.to(boxes.dtype))
    absolute.clip(image_size)
    return absolute


# Of the pasted pixels of one mask, at a time: their coordinates take 16 bytes each.
_PASTED_AT_A_TIME = 1 << 22


class DetectedMasks:
    """Masks of the detections of one image, kept as predicted and pasted when they are asked for.

    Stands where Detectron2 has a bool tensor ``(N, H, W)``, which takes 7 GB for 300 objects of a
    photo of 6000 x 4000 pixels, and has what such tensors are mostly used for: length, ``shape``,
    indices, iteration mask by mask, ``numpy.asarray``. ``tensor`` is the whole of it.

    A pixel belongs to the object where the probability, interpolated between the cells of the
    prediction, is at least ``threshold``. Source: Mask R-CNN; numbers are those of the reference.

    Args:
        probabilities: ``(N, S, S)`` in [0, 1], each of its whole box.
        boxes: ``(N, 4)`` absolute xyxy in pixels of the image; may reach over its edges.
        image_size: (height, width).
        threshold: of the probability.
    """

    def __init__(
        self,
        probabilities: Tensor,
        boxes: Tensor,
        image_size: tuple[int, int],
        threshold: float = 0.5,
    ) -> None:
        self.probabilities = probabilities
        self.boxes = boxes
        self.image_size = image_size
        self.threshold = threshold

    @classmethod
    def cat(cls, parts: Sequence[DetectedMasks]) -> DetectedMasks:
        """The masks of all parts, which are of one image."""
        return cls(
            torch.cat([part.probabilities for part in parts]),
            torch.cat([part.boxes for part in parts]),
            parts[0].image_size,
            parts[0].threshold,
        )

    def __len__(self) -> int:
        return len(self.probabilities)

    def __getitem__(self, item: int | slice | Tensor) -> Tensor | DetectedMasks:
        """The bitmap ``(H, W)`` of one object; for other indices the masks of all these objects."""
        if isinstance(item, int):
            return self._bitmap(*self.patches([item]))
        return DetectedMasks(
            self.probabilities[item], self.boxes[item], self.image_size, self.threshold
        )

    def __iter__(self) -> Iterator[Tensor]:
        """Bitmaps ``(H, W)`` bool on the CPU, of which only one need be in memory."""
        return map(self._bitmap, self.patches())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.tensor.numpy().astype(dtype or bool, copy=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (len(self), *self.image_size)

    @property
    def tensor(self) -> Tensor:
        """``(N, H, W)`` bool on the CPU, with all its bytes."""
        bitmaps = torch.zeros(self.shape, dtype=torch.bool)
        for bitmap, patch in zip(bitmaps, self.patches(), strict=True):
            self._write(patch, bitmap)
        return bitmaps

    def to(self, *arguments: Any, **options: Any) -> DetectedMasks:
        """On another device; see `torch.Tensor.to`."""
        probabilities = self.probabilities.to(*arguments, **options)
        boxes = self.boxes.to(*arguments, **options)
        return DetectedMasks(probabilities, boxes, self.image_size, self.threshold)

    def rles(self) -> list[dict[str, Any]]:
        """COCO's compressed run-length form of each mask, as it stands in json files."""
        return [patch.rle(self.image_size) for patch in self.patches()]

    def patches(self, indices: Sequence[int] | None = None) -> Iterator[MaskPatch]:
        """Each mask, or those of ``indices``, where it can have pixels: a pixel around its box."""
        probabilities, boxes = self.probabilities.float().cpu(), self.boxes.float().cpu()
        for index in range(len(self)) if indices is None else indices:
            yield self._paste(probabilities[index], boxes[index])

    def _paste(self, probabilities: Tensor, box: Tensor) -> MaskPatch:
        height, width = self.image_size
        left, top = (box[:2].floor() - 1).clamp(min=0).int().tolist()
        right, bottom = (box[2:].ceil() + 1).int().tolist()
        right, bottom = min(right, width), min(bottom, height)
        if left >= right or top >= bottom:
            return MaskPatch(left, top, np.zeros((0, 0), bool))
        columns = _sampled_at(left, right, box[0], box[2])
        pixels = np.empty((bottom - top, right - left), bool)
        rows_at_a_time = max(1, _PASTED_AT_A_TIME // (right - left))
        for start in range(top, bottom, rows_at_a_time):
            rows = _sampled_at(start, min(start + rows_at_a_time, bottom), box[1], box[3])
            grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
            values = F.grid_sample(probabilities[None, None], grid[None], align_corners=False)
            first = start - top
            pixels[first : first + len(rows)] = (values[0, 0] >= self.threshold).numpy()
        return MaskPatch(left, top, pixels)

    def _bitmap(self, patch: MaskPatch) -> Tensor:
        bitmap = torch.zeros(self.image_size, dtype=torch.bool)
        self._write(patch, bitmap)
        return bitmap

    @staticmethod
    def _write(patch: MaskPatch, bitmap: Tensor) -> None:
        bitmap[patch.window] = torch.from_numpy(patch.pixels)


def _sampled_at(start: int, stop: int, low: Tensor, high: Tensor) -> Tensor:
    """Centers of pixels as `F.grid_sample` takes them: -1 and 1 are the edges of the box."""
    centers = torch.arange(start, stop, dtype=torch.float32) + 0.5
    places = (centers - low) / (high - low) * 2 - 1
    # A box without area is sampled in its middle, as in the reference.
    return places.nan_to_num(0.0).masked_fill(places.isinf(), 0.0)


def in_output_resolution(found: Instances, sample: Mapping[str, Any]) -> Instances:
    """Scales detections of one input to its output size; what lies in its padding is dropped.

    Args:
        found: in pixels of the network input; masks as `ROIMasks` of probabilities, or as
            Detectron2's mask heads leave them, ``(N, 1, S, S)``.
        sample: of the input: ``image``, and optionally ``height`` and ``width`` of the output.

    Returns:
        the same detections with `DetectedMasks`.
    """
    size = tuple(sample["image"].shape[-2:])
    fields = dict(found.get_fields())
    masks = fields.pop("pred_masks", None)
    if masks is not None:
        fields["probabilities"] = masks.tensor if isinstance(masks, ROIMasks) else masks[:, 0]
    found = detector_postprocess(
        Instances(size, **fields), sample.get("height", size[0]), sample.get("width", size[1])
    )
    if masks is not None:
        probabilities = found.probabilities
        found.remove("probabilities")
        boxes = found.pred_boxes.tensor.clone()
        found.pred_masks = DetectedMasks(probabilities, boxes, found.image_size)
    return found
