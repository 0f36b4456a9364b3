"""What is exported: a graph from pixels to the best detections, its description, its trace.

Masks are exported where the model predicts them, for all detections, as probabilities in the box.

`DetectionGraph` takes and gives tensors only. `Description` is the text beside it, by which a
reader prepares images and reads detections. `trace` makes a graph of PyTorch operators of it.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import torch
from detectron2.structures import Boxes, Instances, ROIMasks
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from co_detr.data.augmentation import ResizeShortestEdge
from co_detr.errors import ConfigError, ExportError
from co_detr.layers.deformable_attention import KERNEL_DEVICES, standard_operators
from co_detr.modeling import CoDETR
from co_detr.modeling.geometry import Geometry, ImageBatch
from co_detr.modeling.mask_losses import refine, values_at
from co_detr.modeling.masks import RefineMaskHead, Regions, pool_level
from co_detr.modeling.postprocess import SoftNMSPostprocessor, choose_pairs
from co_detr.structures import EncoderMemory

INPUTS = ("images", "sizes")
OUTPUTS = ("boxes", "scores", "labels")
MASKS, MASK_IOUS = "masks", "mask_ious"  # the outputs that follow for a model with masks
FORMAT_VERSION = 1

# Height and width of the example that is traced where sizes are free. Different, so that they are
# not taken for one size; no pixel of it is computed.
_EXAMPLE = (768, 832)

_FREE_SIZES = {
    "images": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},
    "sizes": {0: Dim.DYNAMIC},
}


@dataclass(frozen=True)
class Detections:
    """Outputs of the graph for a batch, best first.

    Attributes:
        boxes: ``(B, N, 4)`` xyxy in pixels of the network input, inside the image.
        scores: ``(B, N)``.
        labels: ``(B, N)`` int64, index of the class.
        masks: ``(B, N, S, S)`` probabilities inside of the boxes; None: there are none.
        mask_ious: ``(B, N)`` in [0, 1], how good each mask is: a mask's score is the product of
            this and the score of its box; None: the model does not tell.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
    mask_ious: Tensor | None = None

    def instances(self, index: int, size: tuple[int, int]) -> Instances:
        """Of one image, whose (height, width) in the network input is `size`.

        Masks are `ROIMasks`, as model's heads give them; ``mask_ious`` keep their name.
        """
        found = Instances(
            size,
            pred_boxes=Boxes(self.boxes[index]),
            scores=self.scores[index],
            pred_classes=self.labels[index],
        )
        if self.masks is not None:
            found.pred_masks = ROIMasks(self.masks[index])
        if self.mask_ious is not None:
            found.mask_ious = self.mask_ious[index]
        return found


class DetectionGraph(nn.Module):
    """A detector from RGB pixels to its best (query, class) pairs.

    1. Color order, mean and standard deviation of the model; the padding is overwritten.
    2. Backbone, encoder, queries of inference, decoder.
    3. Top-k over all pairs. Soft-NMS is not in the graph: where the model has it, there are as
       many pairs as it would start from.
    4. The mask head on all of them, if there is one.

    Args:
        model: in eval mode, without its auxiliary part.
        image_format: color order that the model was trained on, "RGB" or "BGR".
        with_masks: False leaves the mask head out.

    Raises:
        ConfigError: for another image format, or another number of channels than three.
    """

    def __init__(self, model: CoDETR, image_format: str, with_masks: bool = True) -> None:
        super().__init__()
        if image_format not in ("RGB", "BGR"):
            raise ConfigError(f"data.image_format={image_format} cannot be exported: use RGB, BGR.")
        if model.pixel_mean.numel() != 3:
            raise ConfigError(
                f"a model for images of {model.pixel_mean.numel()} channels cannot be exported: "
                "use it with co_detr.Predictor."
            )
        self.model = model
        self.reverse_colors = image_format == "BGR"
        self.number = num_pairs(model)
        self.with_masks = with_masks and model.mask_head is not None

    @property
    def outputs(self) -> list[str]:
        """Names of what `forward` gives."""
        if not self.with_masks:
            return list(OUTPUTS)
        return [*OUTPUTS, MASKS] + [MASK_IOUS] * (self.model.mask_head.iou_head is not None)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Detects in one batch.

        Args:
            images: ``(B, 3, H, W)`` uint8 in the order red, green, blue; each image at the top
                left, resized as in the evaluation.
            sizes: ``(B, 2)`` int64, height and width of each image without its padding.

        Returns:
            the `outputs`, as in `Detections`.
        """
        model, own_sizes = self.model, sizes
        padded = tuple(images.shape[2:])
        geometry = Geometry.of([padded], padded, sizes.device, sizes)
        pixels = images.to(model.pixel_mean.dtype)
        if self.reverse_colors:
            pixels = pixels.flip(1)
        mean, std = model.pixel_mean, model.pixel_std
        padding = geometry.padding_mask[:, None]
        pixels = torch.where(padding, model.padding.fill(mean, std), (pixels - mean) / std)
        if not model.padding.masked:
            sizes = torch.zeros_like(sizes) + torch.tensor(padded, device=sizes.device)
            geometry = Geometry.of([padded], padded, sizes.device, sizes)
        memory = model.encode(ImageBatch(pixels, [padded], geometry))
        logits, boxes = model.decode(memory)
        pairs = choose_pairs(logits, boxes, self.number)
        absolute = pairs.absolute(geometry)
        found = absolute, pairs.scores, pairs.labels
        if not self.with_masks:
            return found
        # A model that takes its padding for a part of the image detects there, too; a mask is that
        # of the part of a box that is left in the end.
        limits = own_sizes.flip(1).repeat(1, 2)[:, None].to(absolute.dtype)  # (B, 1, 4)
        return found + self._masks(memory, torch.minimum(absolute, limits), pairs.labels)

    def _masks(self, memory: EncoderMemory, boxes: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Masks, and their IoUs if the head predicts these."""
        head, (batch, number) = self.model.mask_head, labels.shape
        images = torch.arange(batch, device=labels.device)[:, None].expand(batch, number)
        boxes = boxes.flatten(0, 1)
        regions = Regions(boxes, labels.flatten(), images.flatten(), head.levels(boxes))
        maps = memory.maps()
        found = head.predict(
            _pool_every_level(head, maps, regions), head.semantic_maps(maps), regions
        )
        outputs = [refine(found.logits).sigmoid()]
        if head.iou_head is not None:
            outputs.append(values_at(head.iou_head(found), regions.labels))
        return tuple(output.unflatten(0, (batch, number)) for output in outputs)


def _pool_every_level(head: RefineMaskHead, maps: Sequence[Tensor], regions: Regions) -> Tensor:
    """`RefineMaskHead.pool` without a choice that depends on the boxes: a graph has none."""
    pooled = None
    for level, (map_, stride) in enumerate(zip(maps, head.strides, strict=False)):
        here = pool_level(map_, regions.images, regions.boxes, head.sizes[0], stride)
        chosen = (regions.levels == level)[:, None, None, None]
        pooled = here if pooled is None else torch.where(chosen, here, pooled)
    return pooled


def num_pairs(model: CoDETR) -> int:
    """How many (query, class) pairs the graph gives: those that post-processing starts from."""
    if isinstance(model.postprocessor, SoftNMSPostprocessor):
        return model.inference_source.num_queries
    return model.postprocessor.max_detections


@dataclass(frozen=True)
class SoftNMS:
    """Arguments of `SoftNMSPostprocessor`, which runs behind the graph."""

    max_detections: int
    iou_threshold: float
    min_score: float
    sigma: float | None


@dataclass(frozen=True)
class Description:
    """How an exported file is to be fed and read.

    Attributes:
        config: name of the config file.
        class_names: in the order of the labels.
        short_edge: length in pixels that the shorter side of an image is resized to.
        max_size: upper limit of the longer side in pixels.
        image_size: (height, width) of every input, one at a time; None: any, in batches, too.
        min_side: smallest height and width of an input in pixels, where they are free.
        custom_operator: whether the file needs this package to be loaded.
        soft_nms: what follows the graph; None: nothing does.
        masks: names of the outputs behind those of every file; a file without masks has none.
        value_range: the values that become 0 and 255, of images with more than 8 bits per channel;
            None: the range of their type.
        format_version: of these keys and of the inputs and outputs.
    """

    config: str
    class_names: list[str]
    short_edge: int
    max_size: int
    image_size: tuple[int, int] | None = None
    min_side: int = 1
    custom_operator: bool = False
    soft_nms: SoftNMS | None = None
    value_range: tuple[float, float] | None = None
    masks: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image is resized to: as in the evaluation, but so that it fits
        into `image_size`."""
        shape = ResizeShortestEdge.get_output_shape(height, width, self.short_edge, self.max_size)
        if self.image_size is None:
            return shape
        factor = min(limit / side for limit, side in zip(self.image_size, shape, strict=True))
        if factor >= 1:
            return shape
        return tuple(
            max(1, min(limit, int(side * factor + 0.5)))
            for limit, side in zip(self.image_size, shape, strict=True)
        )

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the input that a resized image becomes."""
        if self.image_size is not None:
            return self.image_size
        return max(height, self.min_side), max(width, self.min_side)

    def to_text(self) -> dict[str, str]:
        """Every attribute as JSON."""
        return {key: json.dumps(value) for key, value in asdict(self).items()}

    @classmethod
    def from_text(cls, text: Mapping[str, str], path: str) -> Description:
        """The reverse of `to_text`; other keys are passed over.

        Raises:
            ExportError: if keys are missing, or the file `path` is of another format version.
        """
        version = text.get("format_version", "")
        if version not in ("", str(FORMAT_VERSION)):
            raise ExportError(
                f"{path} has format version {version}, this version of co_detr reads "
                f"{FORMAT_VERSION}: export the model again."
            )
        try:
            # Files that were written before there were a range and masks have none.
            complete = {"value_range": "null", "masks": "[]", **text}
            values = {field.name: json.loads(complete[field.name]) for field in fields(cls)}
        except (KeyError, ValueError) as error:
            raise ExportError(
                f"{path} does not describe itself ({error}): export the model with tools/export.py."
            ) from error
        if values["image_size"] is not None:
            values["image_size"] = tuple(values["image_size"])
        values["masks"] = tuple(values["masks"])
        if values["value_range"] is not None:
            values["value_range"] = tuple(values["value_range"])
        if values["soft_nms"] is not None:
            values["soft_nms"] = SoftNMS(**values["soft_nms"])
        return cls(**values)


def trace(
    graph: DetectionGraph, image_size: tuple[int, int] | None, custom_operator: bool
) -> ExportedProgram:
    """Traces the graph.

    Args:
        image_size: (height, width) in pixels of every input, one image at a time; None: batches of
            any size of images of any size.
        custom_operator: keep this package's deformable attention as one operator, which is fast
            but has to be there when the file is loaded; False: standard operators.

    Raises:
        ExportError: if the operator is not built, or the model does not bear free sizes.
    """
    if custom_operator and "cpu" not in KERNEL_DEVICES:
        raise ExportError(
            "the kernels of co_detr are not built, so there is no custom operator to keep: build "
            "them with `pip install --no-build-isolation -e .`, or export standard operators."
        )
    operators = contextlib.nullcontext() if custom_operator else standard_operators()
    with operators, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own parts
        if image_size is not None:
            return torch.export.export(graph, _example(1, image_size), strict=False)
        try:
            return torch.export.export(
                graph, _example(2, _EXAMPLE), dynamic_shapes=_FREE_SIZES, strict=False
            )
        except torch._dynamo.exc.UserError as error:
            raise ExportError(
                "this model cannot be exported for images of any size: give the size of the "
                "network input with --image-size, as in --image-size 800x1344."
            ) from error


def _example(batch: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, 3, *size, dtype=torch.uint8), torch.tensor([size] * batch)


def smallest_side(program: ExportedProgram) -> int:
    """The smallest height and width in pixels that a traced graph allows."""
    images = next(
        node for node in program.graph.nodes if node.name == program.graph_signature.user_inputs[0]
    )
    free = [side.node.expr for side in images.meta["val"].shape[2:] if not isinstance(side, int)]
    return max([1, *(int(program.range_constraints[side].lower) for side in free)])
