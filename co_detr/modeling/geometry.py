"""How images become a batch, and where they and the cells of its maps lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from detectron2.structures import ImageList
from torch import Tensor, nn

from co_detr.errors import ConfigError
from co_detr.structures import tensor_on


@dataclass(frozen=True)
class Geometry:
    """Sizes of the images of a batch, as every part that needs them reads them.

    Made once, in preprocessing; `at_levels` adds the maps as soon as there are some.

    Attributes:
        image_sizes: un-padded (height, width) of each image as Python integers, which the host
            reads without waiting for the device.
        sizes: ``(B, 2)`` int64, the same on the device.
        padded: (height, width) of the whole batch.
        factors: ``(B, 4)`` = (w, h, w, h) float32, from normalized to absolute boxes.
    """

    image_sizes: list[tuple[int, int]]
    sizes: Tensor
    padded: tuple[int, int]
    factors: Tensor

    @classmethod
    def of(
        cls,
        image_sizes: Sequence[tuple[int, int]],
        padded: Sequence[int],
        device: torch.device,
        sizes: Tensor | None = None,
    ) -> Geometry:
        """From sizes on the host, in one copy that does not wait.

        Args:
            sizes: the same on the device, where they are an input (of an exported graph).
        """
        image_sizes = [tuple(size) for size in image_sizes]
        if sizes is None:
            sizes = tensor_on(image_sizes, torch.long, device)
        return cls(image_sizes, sizes, tuple(padded), sizes.flip(1).repeat(1, 2).float())

    @cached_property
    def padding_mask(self) -> Tensor:
        """``(B, H, W)`` bool, True for pixels of the padding."""
        heights, widths = self.sizes[:, :, None, None].unbind(1)
        rows = torch.arange(self.padded[0], device=self.sizes.device)[None, :, None]
        columns = torch.arange(self.padded[1], device=self.sizes.device)[None, None, :]
        return (rows >= heights) | (columns >= widths)

    def at_levels(
        self,
        level_shapes: list[tuple[int, int]],
        strides: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Levels:
        """With maps of the batch.

        A map has a cell for every ``stride`` pixels that were begun: an image of 235 pixels has 8
        cells of stride 32 and covers 7.34 of them. The reference takes it to cover all 8. That
        moves what is at its far end by 21 pixels on this level and by 5 on that of stride 8; where
        the stride divides the size, nothing moves. On images of 1000 pixels it hardly matters. On
        small ones the decoder learns the mean error over its training sizes and then makes up for
        one that is not there.

        Args:
            level_shapes: (height, width) of each map, finest first.
            strides: of the maps in pixels: valid ratios are exact shares; None: they are those of
                the cells that hold a part of the image.
            dtype: of the valid ratios.
        """
        masks = [shrink_mask(self.padding_mask, *shape) for shape in level_shapes]
        if strides is None:
            ratios = [valid_ratio(mask, dtype) for mask in masks]
        else:
            height, width = self.sizes.to(dtype).unbind(1)
            ratios = [
                torch.stack([width / (stride * columns), height / (stride * rows)], dim=-1)
                for stride, (rows, columns) in zip(strides, level_shapes, strict=True)
            ]
        flat = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        return Levels(self, level_shapes, flat, torch.stack(ratios, dim=1), strides is not None)


@dataclass(frozen=True)
class Levels:
    """The maps of a batch and where its images lie in them; S tokens are the cells of all L maps.

    Attributes:
        images: sizes of the images.
        level_shapes: (height, width) of each map as Python integers, so that splitting needs no
            sync.
        padding_mask: ``(B, S)`` bool, True where the token lies in the batch padding.
        valid_ratios: ``(B, L, 2)``, un-padded share (width, height) of each map in (0, 1].
        exact: whether these are exact shares, see `Geometry.at_levels`.
    """

    images: Geometry
    level_shapes: list[tuple[int, int]]
    padding_mask: Tensor
    valid_ratios: Tensor
    exact: bool = False

    @cached_property
    def sizes(self) -> Tensor:
        """``(L, 2)`` width and height of each map, as the valid ratios in type."""
        ratios = self.valid_ratios
        sizes = [(width, height) for height, width in self.level_shapes]
        return tensor_on(sizes, ratios.dtype, ratios.device)

    @cached_property
    def centers(self) -> list[Tensor]:
        """``(H * W, 2)`` xy of each map's cells in cells, row by row."""
        return [cell_centers(*shape, self.valid_ratios) for shape in self.level_shapes]

    def masks(self) -> list[Tensor]:
        """``(B, H, W)`` of each map: the parts of the padding mask."""
        parts = self.padding_mask.split([h * w for h, w in self.level_shapes], dim=1)
        return [
            part.unflatten(1, shape) for part, shape in zip(parts, self.level_shapes, strict=True)
        ]

    def positions(self, encoding: SinePosition) -> list[Tensor]:
        """``(B, H * W, C)`` code of each map's cells."""
        ratios = self.valid_ratios
        exact = ratios.unbind(1) if self.exact else [None] * len(self.level_shapes)
        return [
            encoding(mask, ratios.dtype, ratio).flatten(2).transpose(1, 2)
            for mask, ratio in zip(self.masks(), exact, strict=True)
        ]

    def reference_points(self) -> Tensor:
        """Cell centers of all tokens, expressed in the coordinates of every level.

        Returns:
            ``(B, S, L, 2)`` xy; [0, 1] spans the padded level, so values stay below its valid ratio
            for tokens inside the image.
        """
        points = []
        for level, (height, width) in enumerate(self.level_shapes):
            x, y = self.centers[level].unbind(-1)
            grid = torch.stack([x / width, y / height], dim=-1)
            # (B, H*W, 2) of the un-padded image
            points.append(grid / self.valid_ratios[:, level, None])
        return torch.cat(points, dim=1)[:, :, None] * self.valid_ratios[:, None]

    def grid_priors(self) -> Tensor:
        """``(B, S, 4)`` normalized boxes on the cells, of side 0.05 * 2^level."""
        extents = self.valid_ratios * self.sizes  # (B, L, 2) un-padded cells
        priors = []
        for level, centers in enumerate(self.centers):
            center = centers / extents[:, level, None]
            priors.append(torch.cat([center, torch.full_like(center, 0.05 * 2**level)], dim=-1))
        return torch.cat(priors, dim=1)


class ImageBatch(ImageList):
    """Padded images as Detectron2 has them, with their geometry."""

    def __init__(
        self,
        tensor: Tensor,
        image_sizes: Sequence[tuple[int, int]],
        geometry: Geometry | None = None,
    ) -> None:
        super().__init__(tensor, list(image_sizes))
        self.geometry = geometry or Geometry.of(image_sizes, tensor.shape[-2:], tensor.device)


@dataclass(frozen=True)
class BatchPadding:
    """Pads images at the bottom and right to a common size.

    Attributes:
        square_size: side in pixels of the square to pad to; 0: the largest height and width in the
            batch, as the backbone divides them.
        value: of the padding, in the range of the un-normalized images; None: the mean color.
        masked: False makes the padding part of the images: attention sees it, and boxes are
            normalized by the padded size, as in the reference's large-scale jitter.
    """

    square_size: int = 0
    value: float | None = None
    masked: bool = True

    def __call__(
        self,
        images: list[Tensor],
        mean: Tensor,
        std: Tensor,
        divisibility: int,
        constraints: Mapping[str, int],
    ) -> ImageBatch:
        """Normalizes and pads.

        Args:
            images: ``(C, H, W)`` each.
            mean, std: ``(C, 1, 1)``.
            divisibility, constraints: of the backbone's input, as Detectron2's backbones state
                them.

        Returns:
            the batch with the un-padded sizes (height, width), or, if not ``masked``, with the
            padded ones.

        Raises:
            ConfigError: if an image is larger than the square (of ``square_size`` or the backbone).
        """
        constraints = dict(constraints)
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
            divisibility,
            padding_constraints=constraints,
        )
        pixels, sizes, geometry = batch.tensor, batch.image_sizes, None
        if self.value is not None:
            geometry = Geometry.of(sizes, pixels.shape[-2:], pixels.device)
            pixels = torch.where(geometry.padding_mask[:, None], self.fill(mean, std), pixels)
        if not self.masked:
            sizes, geometry = [tuple(pixels.shape[-2:])] * len(images), None
        return ImageBatch(pixels, sizes, geometry)

    def fill(self, mean: Tensor, std: Tensor) -> Tensor:
        """What stands in the padding of normalized images, ``(C, 1, 1)``."""
        return torch.zeros_like(mean) if self.value is None else (self.value - mean) / std


def shrink_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """``(B, H, W)`` bool to a level's size, the values of ``F.interpolate``'s nearest neighbors.

    In steps of its own, as ONNX divides by the inverse factor, which can round to the cell before.
    """
    for dim, size in ((1, height), (2, width)):
        cells = torch.arange(size, dtype=torch.float32, device=mask.device)
        source = cells * (torch.full_like(cells, mask.shape[dim]) / size)
        mask = mask.index_select(dim, source.long().clamp(max=mask.shape[dim] - 1))
    return mask


def valid_ratio(padding_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Share of a level's cells that are un-padded, ``(B, H, W) bool -> (B, 2)``, width first."""
    _, height, width = padding_mask.shape
    inside = (~padding_mask).to(dtype)
    return torch.stack([inside[:, 0, :].sum(1) / width, inside[:, :, 0].sum(1) / height], dim=-1)


def cell_centers(height: int, width: int, like: Tensor) -> Tensor:
    """``(height * width, 2)`` xy of a map's cells in cells, row by row, as ``like`` in type."""
    y = torch.arange(height, dtype=like.dtype, device=like.device) + 0.5
    x = torch.arange(width, dtype=like.dtype, device=like.device) + 0.5
    # Not repeat_interleave, whose translation to ONNX fails where the size is an input.
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)


class SinePosition(nn.Module):
    """Encodes the position of every cell of a padded map.

    Coordinates count un-padded cells, are divided by the extent of the image and scaled to 2 pi.

    Args:
        embed_dim: channels C of the encoding: the first half codes y, the second x.
        temperature: 10000 in Deformable-DETR, 20 in DINO.
        offset: added to the 1-based cell number; -0.5 (cell centers) in Deformable-DETR, 0 in DINO.

    Raises:
        ConfigError: if ``embed_dim`` is not a multiple of 4.
    """

    def __init__(self, embed_dim: int, temperature: float = 10000.0, offset: float = -0.5):
        super().__init__()
        if embed_dim % 4:
            raise ConfigError(f"SinePosition needs embed_dim divisible by 4, got {embed_dim}.")
        self.num_features = embed_dim // 2
        self.temperature = temperature
        self.offset = offset

    def forward(
        self,
        padding_mask: Tensor,
        dtype: torch.dtype = torch.float32,
        valid_ratio: Tensor | None = None,
    ) -> Tensor:
        """``(B, H, W)`` bool (True = padding) -> ``(B, C, H, W)``.

        Args:
            valid_ratio: ``(B, 2)``, the image's exact share of the map's width and height, of which
                it may cover the last cell in part; None: it covers all cells that it touches.
        """
        inside = (~padding_mask).to(dtype)
        encodings = []
        for axis in (1, 2):
            cells = inside.cumsum(axis)
            if valid_ratio is None:
                extent = cells.narrow(axis, cells.shape[axis] - 1, 1)
            else:
                extent = valid_ratio[:, 2 - axis, None, None] * cells.shape[axis]
            angle = (cells + self.offset) / (extent + 1e-6) * (2 * math.pi)
            encodings.append(sine_features(angle, self.num_features, self.temperature))
        return torch.cat(encodings, dim=3).permute(0, 3, 1, 2)


def encode_boxes(boxes: Tensor, features_per_coordinate: int) -> Tensor:
    """Codes normalized boxes ``(B, Q, 4)`` as ``(B, Q, 4 * features)``, order cx, cy, w, h."""
    return sine_features(boxes * (2 * math.pi), features_per_coordinate, 10000.0).flatten(2)


def sine_features(angle: Tensor, num_features: int, temperature: float) -> Tensor:
    """``(...)`` angles -> ``(..., num_features)``, sine and cosine interleaved."""
    exponent = torch.arange(num_features, dtype=angle.dtype, device=angle.device)
    exponent = 2 * exponent.div(2, rounding_mode="floor") / num_features
    phase = angle[..., None] / temperature**exponent
    return torch.stack([phase[..., 0::2].sin(), phase[..., 1::2].cos()], dim=-1).flatten(-2)
