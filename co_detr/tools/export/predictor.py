"""An exported file as a function from images to detections, and its comparison with the model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import detectron2.data.transforms as T
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from co_detr.data.images import MAX_PIXELS, ImageReader, ImageSource
from co_detr.data.loader import in_format
from co_detr.errors import ConfigError, ExportError
from co_detr.modeling import CoDETR
from co_detr.modeling.geometry import ImageBatch
from co_detr.modeling.postprocess import SoftNMSPostprocessor, choose_pairs, in_output_resolution
from co_detr.structures import EncoderMemory
from co_detr.tools.export import BOX_TOLERANCE, MASK_TOLERANCE, SCORE_TOLERANCE
from co_detr.tools.export.exporting import OnnxModel, TorchModel
from co_detr.tools.export.graph import Description, Detections, num_pairs
from co_detr.tools.predict.predictor import Sample, make_sample

_APART = 1e9  # cost of a pair of two classes, or of a NaN
Result = TypeVar("Result")


class ExportedPredictor:
    """Detects objects in images with an exported file, as `co_detr.Predictor` does with a model.

    Usage:

        predictor = ExportedPredictor("model.onnx")
        found = predictor("street.jpg")
        print(predictor.names(found), found.pred_boxes)

    Args:
        path: file that tools/export.py wrote: ``.onnx``, or ``.pt2`` of torch.export.
        score_threshold: detections below it are left out, from 0 to 1.
        providers: of onnxruntime, the best one first.
        max_image_pixels: image files with more are refused; None: no limit.

    Attributes:
        description: what the file says about itself.
        class_names: in the order of ``pred_classes``.

    Raises:
        ConfigError: if an argument is wrong or onnxruntime is not installed.
        ExportError: if the file is missing or cannot be loaded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        score_threshold: float = 0.0,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        max_image_pixels: int | None = MAX_PIXELS,
    ) -> None:
        if not 0 <= score_threshold <= 1:
            raise ConfigError(f"the score threshold {score_threshold} must be from 0 to 1.")
        self.score_threshold = score_threshold
        self.model = load_exported(Path(path), providers)
        self.description = self.model.description
        self.class_names = self.description.class_names
        self.reader = ImageReader(self.description.value_range, max_image_pixels)
        self._resize = T.AugmentationList([_Resize(self.description)])
        soft_nms = self.description.soft_nms
        self._soft_nms = None if soft_nms is None else SoftNMSPostprocessor(**vars(soft_nms))

    def __call__(self, images: ImageSource | Sequence[ImageSource]) -> Instances | list[Instances]:
        """Detections of one image, or a list of them for a list or tuple of images.

        Images run one after the other. See `co_detr.Predictor` for the images and the result.
        """
        if isinstance(images, list | tuple):
            return [self(image) for image in images]
        sample = self.prepare(images)
        size = tuple(sample.image.shape[-2:])
        found = self.run(sample).instances(0, size)
        if self._soft_nms is not None:
            found = self._soft_nms.thin_out(found)
        if found.has("mask_ious"):
            found.mask_scores = found.scores * found.mask_ious
            found.remove("mask_ious")
        height, width = sample.rgb.shape[:2]
        found = in_output_resolution(
            found, {"image": sample.image, "height": height, "width": width}
        )
        return found[found.scores >= self.score_threshold]

    def names(self, instances: Instances) -> list[str]:
        """The class name of each detection."""
        return [self.class_names[index] for index in instances.pred_classes.tolist()]

    def prepare(self, image: ImageSource) -> Sample:
        """Reads and resizes an image as the evaluation does, or smaller if the file needs it."""
        return make_sample(image, self.reader, self._resize, "RGB")

    def run(self, sample: Sample) -> Detections:
        """What the graph gives for a batch of one image, which is padded as the file needs it."""
        return self.model(pad(sample.image, self.description)[None], size_of(sample.image)[None])


def load_exported(path: Path, providers: Sequence[str]) -> OnnxModel | TorchModel:
    """The model in a file, by its suffix."""
    if not path.is_file():
        raise ExportError(f"exported file {path} does not exist: name one of tools/export.py.")
    if path.suffix == ".onnx":
        return OnnxModel(path, providers)
    if path.suffix == ".pt2":
        return TorchModel(path)
    raise ExportError(f"{path} is no exported file: name one that ends in .onnx or .pt2.")


def pad(image: Tensor, description: Description) -> Tensor:
    """``(3, h, w)`` -> ``(3, H, W)``, the input of the graph; it overwrites the padding."""
    height, width = image.shape[-2:]
    padded_height, padded_width = description.padded(height, width)
    return F.pad(image, (0, padded_width - width, 0, padded_height - height))


def size_of(image: Tensor) -> Tensor:
    """``(2,)`` int64, height and width."""
    return torch.tensor(image.shape[-2:])


class _Resize(T.Augmentation):
    """Detectron2's resize to the size that a file wants."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.description = description

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        return T.ResizeTransform(height, width, *self.description.resized(height, width))


@dataclass(frozen=True)
class Difference:
    """Two lists of detections of one image.

    Attributes:
        compared: pairs of detections, one of each list.
        at_cut: detections of either list without a partner, whose score lies within the tolerance
            of the lowest one: noise decides which of them are among the best.
        lost: other detections without a partner.
        score, box: largest differences of all pairs, of scores and of box sides in pixels.
        mask: the same of masks: of the mean of their probabilities, and of their IoUs.
    """

    compared: int
    at_cut: int
    lost: int
    score: float
    box: float
    mask: float = 0.0

    @property
    def is_small(self) -> bool:
        return (
            self.compared > self.at_cut
            and self.lost == 0
            and self.score <= SCORE_TOLERANCE
            and self.box <= BOX_TOLERANCE
            and self.mask <= MASK_TOLERANCE
        )


@dataclass(frozen=True)
class Check:
    """One image: the difference, the network input (height, width), seconds of both."""

    difference: Difference
    input_size: tuple[int, int]
    model_seconds: float
    file_seconds: float


def check_image(
    predictor: ExportedPredictor, model: CoDETR, image_format: str, image: ImageSource
) -> Check:
    """Runs the file and the model on the same network input.

    The model takes its own way to its own normalization, padding and kernels. Where the file pads
    images to a fixed size, the model gets the same padding: what padding does to detections is no
    difference of the file.
    """
    sample = predictor.prepare(image)
    description = predictor.description
    size = description.padded(*sample.image.shape[-2:])
    masks = bool(description.masks)
    expected, model_seconds = _timed(lambda: _detect(model, image_format, sample, size, masks))
    found, file_seconds = _timed(lambda: predictor.run(sample))
    return Check(difference(expected, found), size, model_seconds, file_seconds)


def _timed(call: Callable[[], Result]) -> tuple[Result, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


@torch.no_grad()
def _detect(
    model: CoDETR, image_format: str, sample: Sample, padded: tuple[int, int], with_masks: bool
) -> Detections:
    pixels = in_format(sample.image.permute(1, 2, 0).numpy(), image_format)
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    batch = model.preprocess([{"image": image}])
    height, width = batch.tensor.shape[-2:]
    tensor = F.pad(batch.tensor, (0, padded[1] - width, 0, padded[0] - height))
    memory = model.encode(ImageBatch(tensor, batch.image_sizes))
    logits, boxes = model.decode(memory)
    pairs = choose_pairs(logits, boxes, num_pairs(model))
    found = Detections(pairs.absolute(memory.geometry), pairs.scores, pairs.labels)
    return _masked(model, memory, found, sample) if with_masks else found


def _masked(model: CoDETR, memory: EncoderMemory, found: Detections, sample: Sample) -> Detections:
    """Detections of one image with the masks of the model."""
    instances = found.instances(0, tuple(sample.image.shape[-2:]))
    instances.pred_boxes = Boxes(found.boxes[0].clone())
    instances.pred_boxes.clip(instances.image_size)
    (masked,) = model.mask_head.detect(memory, [instances])
    ious = (masked.mask_scores / masked.scores)[None] if masked.has("mask_scores") else None
    return replace(found, masks=masked.pred_masks.tensor[None], mask_ious=ious)


def difference(expected: Detections, found: Detections) -> Difference:
    """Compares detections of a batch of one.

    Order means nothing: detections of nearly equal scores change places. Every detection is paired
    with one of the same class so that the sum of all differences, in units of the tolerances, is
    smallest.
    """
    lists = (expected, found)
    scores = [detections.scores[0].double() for detections in lists]
    boxes = [detections.boxes[0].double() for detections in lists]
    labels = [detections.labels[0] for detections in lists]
    score_gap = (scores[0][:, None] - scores[1][None]).abs()
    box_gap = (boxes[0][:, None] - boxes[1][None]).abs().amax(-1)
    cost = score_gap / SCORE_TOLERANCE + box_gap / BOX_TOLERANCE
    cost[labels[0][:, None] != labels[1][None]] = _APART
    cost = cost.nan_to_num(nan=_APART)
    rows, columns = (torch.from_numpy(index) for index in linear_sum_assignment(cost.numpy()))
    near_cut = [values <= values.min() + SCORE_TOLERANCE for values in scores]
    apart = cost[rows, columns] >= _APART
    far = (score_gap[rows, columns] > SCORE_TOLERANCE) | (box_gap[rows, columns] > BOX_TOLERANCE)
    # A pair that does not fit, both at the cut: one fell out of each list.
    swapped = far & near_cut[0][rows] & near_cut[1][columns]
    paired = ~(apart | swapped)
    alone = torch.cat([near_cut[0][rows[~paired]], near_cut[1][columns[~paired]]])
    rows, columns = rows[paired], columns[paired]
    mask = 0.0
    if expected.masks is not None and len(rows):
        gaps = [(expected.masks[0, rows] - found.masks[0, columns]).abs().mean((1, 2))]
        if expected.mask_ious is not None:
            gaps.append((expected.mask_ious[0, rows] - found.mask_ious[0, columns]).abs())
        mask = float(torch.cat(gaps).max())
    return Difference(
        compared=len(rows),
        at_cut=int(alone.sum()),
        lost=int((~alone).sum()) + abs(len(scores[0]) - len(scores[1])),
        score=float(score_gap[rows, columns].max()) if len(rows) else 0.0,
        box=float(box_gap[rows, columns].max()) if len(rows) else 0.0,
        mask=mask,
    )
