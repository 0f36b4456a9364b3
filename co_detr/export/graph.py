"""What is exported: pixels in, the best detections out, tensors only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from co_detr.errors import ConfigError
from co_detr.modeling import CoDETR
from co_detr.modeling.boxes import cxcywh_to_xyxy
from co_detr.modeling.postprocess import SoftNMSPostprocessor, choose_pairs, outside

INPUTS = ("images", "sizes")
OUTPUTS = ("boxes", "scores", "labels")


@dataclass(frozen=True)
class Detections:
    """Outputs of the graph for a batch, best first.

    Attributes:
        boxes: ``(B, N, 4)`` xyxy in pixels of the network input, inside the image.
        scores: ``(B, N)``.
        labels: ``(B, N)`` int64, index of the class.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def instances(self, index: int, size: tuple[int, int]) -> Instances:
        """Of one image, whose (height, width) in the network input is `size`."""
        return Instances(
            size,
            pred_boxes=Boxes(self.boxes[index]),
            scores=self.scores[index],
            pred_classes=self.labels[index],
        )


class DetectionGraph(nn.Module):
    """A detector from RGB pixels to its best (query, class) pairs.

    1. Colour order, mean and standard deviation of the model; the padding is overwritten.
    2. Backbone, encoder, queries of inference, decoder.
    3. Top-k over all pairs. Soft-NMS is not in the graph: where the model has it, there are as
       many pairs as it would start from.

    Args:
        model: in eval mode, without its auxiliary part.
        image_format: colour order that the model was trained on, "RGB" or "BGR".

    Raises:
        ConfigError: for another image format.
    """

    def __init__(self, model: CoDETR, image_format: str) -> None:
        super().__init__()
        if image_format not in ("RGB", "BGR"):
            raise ConfigError(f"data.image_format={image_format} cannot be exported: use RGB, BGR.")
        self.model = model
        self.reverse_colours = image_format == "BGR"
        self.number = num_pairs(model)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detects in one batch.

        Args:
            images: ``(B, 3, H, W)`` uint8 in the order red, green, blue; each image at the top
                left, resized as in the evaluation.
            sizes: ``(B, 2)`` int64, height and width of each image without its padding.

        Returns:
            boxes, scores and labels as in `Detections`.
        """
        model = self.model
        mask = outside(sizes, images.shape)
        pixels = images.to(model.pixel_mean.dtype)
        if self.reverse_colours:
            pixels = pixels.flip(1)
        mean, std = model.pixel_mean, model.pixel_std
        pixels = torch.where(mask[:, None], model.padding.fill(mean, std), (pixels - mean) / std)
        if not model.padding.masked:
            mask = torch.zeros_like(mask)
            sizes = torch.zeros_like(sizes) + torch.tensor(
                [images.shape[2], images.shape[3]], device=sizes.device
            )
        logits, boxes = model.decode(model.encode_pixels(pixels, mask, [tuple(images.shape[2:])]))
        pairs = choose_pairs(logits, boxes, self.number)
        extent = sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)  # (B, 1, 4) = w, h, w, h
        absolute = (cxcywh_to_xyxy(pairs.boxes) * extent).clamp(min=0)
        return torch.minimum(absolute, extent), pairs.scores, pairs.labels


def num_pairs(model: CoDETR) -> int:
    """How many (query, class) pairs the graph gives: those that post-processing starts from."""
    if isinstance(model.postprocessor, SoftNMSPostprocessor):
        return model.inference_source.num_queries
    return model.postprocessor.max_detections
