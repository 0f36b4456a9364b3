"""How images of different sizes become one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.modeling import Backbone
from detectron2.structures import ImageList
from torch import Tensor

from co_detr.errors import ConfigError
from co_detr.modeling.postprocess import padding_mask


@dataclass(frozen=True)
class BatchPadding:
    """Pads images at the bottom and right to a common size.

    Attributes:
        square_size: side in pixels of the square to pad to; 0: the largest height and width in the
            batch, as the backbone divides them.
        value: of the padding, in the range of the un-normalised images; None: the mean colour.
        masked: False makes the padding part of the images: attention sees it, and boxes are
            normalised by the padded size, as in the reference's large-scale jitter.
    """

    square_size: int = 0
    value: float | None = None
    masked: bool = True

    def __call__(
        self, images: list[Tensor], mean: Tensor, std: Tensor, backbone: Backbone
    ) -> ImageList:
        """Normalises and pads.

        Args:
            images: ``(C, H, W)`` each.
            mean, std: ``(C, 1, 1)``.
            backbone: states what its input has to be divisible by.

        Returns:
            the batch with the un-padded sizes (height, width), or, if not ``masked``, with the
            padded ones.

        Raises:
            ConfigError: if an image is larger than the square (of ``square_size`` or the backbone).
        """
        constraints = dict(backbone.padding_constraints)
        if self.square_size:
            constraints["square_size"] = self.square_size
        square_size = constraints.get("square_size", 0)
        largest = max(max(image.shape[-2:]) for image in images)
        if square_size and largest > square_size:
            source = "model.padding" if self.square_size else "the backbone"
            raise ConfigError(
                f"an image has a side of {largest} pixels, but {source}.square_size is "
                f"{square_size}: let the augmentations of dataloader make it fit."
            )
        batch = ImageList.from_tensors(
            [(image - mean) / std for image in images],
            backbone.size_divisibility,
            padding_constraints=constraints,
        )
        pixels, sizes = batch.tensor, batch.image_sizes
        if self.value is not None:
            padding = padding_mask(sizes, pixels.shape, pixels.device)
            pixels = torch.where(padding[:, None], self.fill(mean, std), pixels)
        if not self.masked:
            sizes = [tuple(pixels.shape[-2:])] * len(images)
        return ImageList(pixels, sizes)

    def fill(self, mean: Tensor, std: Tensor) -> Tensor:
        """What stands in the padding of normalised images, ``(C, 1, 1)``."""
        return torch.zeros_like(mean) if self.value is None else (self.value - mean) / std
