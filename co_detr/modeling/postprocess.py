"""From decoded queries to detections."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from co_detr.errors import NonFiniteError
from co_detr.modeling.boxes import cxcywh_to_xyxy, size_factor


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
        num_classes = logits.shape[-1]
        scores = logits.float().sigmoid().flatten(1)
        scores, pairs = scores.topk(min(self.max_detections, scores.shape[1]), dim=1)
        queries = pairs // num_classes
        chosen = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
        if not chosen.isfinite().all():
            raise NonFiniteError(
                "the model predicts boxes that are NaN: its weights or the image are not finite; "
                "check train.init_checkpoint, or go back to an earlier checkpoint."
            )
        results = []
        for image, size in enumerate(image_sizes):
            absolute = Boxes(cxcywh_to_xyxy(chosen[image]) * size_factor(size, chosen))
            absolute.clip(size)
            results.append(
                Instances(
                    size,
                    pred_boxes=absolute,
                    scores=scores[image],
                    pred_classes=pairs[image] % num_classes,
                )
            )
        return results


def padding_mask(
    image_sizes: list[tuple[int, int]], padded: torch.Size, device: torch.device
) -> Tensor:
    """``(B, H, W)`` bool, True where a batch of shape ``(B, C, H, W)`` holds padding."""
    heights = torch.tensor([size[0] for size in image_sizes], device=device)[:, None, None]
    widths = torch.tensor([size[1] for size in image_sizes], device=device)[:, None, None]
    rows = torch.arange(padded[-2], device=device)[None, :, None]
    columns = torch.arange(padded[-1], device=device)[None, None, :]
    return (rows >= heights) | (columns >= widths)
