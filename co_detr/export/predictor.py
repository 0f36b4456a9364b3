"""An exported file as a function from images to detections."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import detectron2.data.transforms as T
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from torch import Tensor

from co_detr.data.images import MAX_PIXELS, ImageReader, ImageSource
from co_detr.errors import ConfigError, ExportError
from co_detr.export.description import Description
from co_detr.export.graph import Detections
from co_detr.export.onnx_file import OnnxModel
from co_detr.export.torch_file import TorchModel
from co_detr.modeling.postprocess import SoftNMSPostprocessor
from co_detr.tools.predict.predictor import Sample, make_sample


class ExportedPredictor:
    """Detects objects in images with an exported file, as `co_detr.Predictor` does with a model.

    Usage::

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
        found = detector_postprocess(found, *sample.rgb.shape[:2])
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
