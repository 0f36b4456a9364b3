"""From a trained detector to a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import detectron2.data.transforms as T
from detectron2.config import instantiate
from omegaconf import DictConfig

from co_detr.checkpoint.detector import Detector
from co_detr.data.images import ImageReader
from co_detr.errors import ConfigError, ExportError
from co_detr.export.description import Description, SoftNMS
from co_detr.export.graph import DetectionGraph
from co_detr.export.onnx_file import require, write_onnx
from co_detr.export.torch_file import write_torch
from co_detr.export.tracing import smallest_side, trace
from co_detr.modeling import CoDETR
from co_detr.modeling.backbones import SwinTransformer
from co_detr.modeling.detectors import DECODER
from co_detr.modeling.postprocess import SoftNMSPostprocessor

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}


@dataclass(frozen=True)
class ExportSettings:
    """Attributes:
    format: of the file.
    image_size: (height, width) in pixels of the network input, to which images are padded, one
        at a time; None: any size and batch, or the square that the model pads to.
    custom_operator: keep this package's operator in a file of torch.export.
    """

    format: Literal["onnx", "torch_export"]
    image_size: tuple[int, int] | None = None
    custom_operator: bool = False


def export_detector(
    detector: Detector, config_name: str, path: str | os.PathLike[str], settings: ExportSettings
) -> Description:
    """Writes a detector to a file and returns what the file says about itself.

    Args:
        detector: as `load_detector` gives it, without its auxiliary part and on the CPU.
        config_name: to be remembered in the file.

    Raises:
        ConfigError: if packages are missing, or settings do not fit the model or the file name.
        ExportError: if the model cannot be traced.
    """
    path = Path(path)
    _check(path, settings)
    model = detector.model
    if model.decoder is None:
        raise ConfigError("model.decoder is null: only detections of a decoder can be exported.")
    if model.evaluate_with not in (None, DECODER):
        raise ConfigError(
            f"the detector {model.evaluate_with} cannot be exported: a file can hold the decoder "
            "alone, so leave --detector out and set model.evaluate_with to null."
        )
    image_size = _image_size(model, settings.image_size)
    short_edge, max_size = _test_size(detector.cfg)
    graph = DetectionGraph(model, detector.cfg.dataloader.test.mapper.image_format).eval()
    program = trace(graph, image_size, settings.custom_operator)
    description = Description(
        config=config_name,
        class_names=detector.class_names,
        short_edge=short_edge,
        max_size=max_size,
        image_size=image_size,
        min_side=smallest_side(program),
        custom_operator=settings.custom_operator,
        soft_nms=_soft_nms(model),
        value_range=ImageReader.of_data(detector.cfg.data).value_range,
    )
    write = write_onnx if settings.format == "onnx" else write_torch
    write(program, description, path)
    return description


def _check(path: Path, settings: ExportSettings) -> None:
    suffix = SUFFIXES[settings.format]
    if path.suffix != suffix:
        raise ConfigError(f"the output {path} must end in {suffix} for {settings.format}.")
    if not path.parent.is_dir():
        raise ConfigError(f"the folder of {path} does not exist: make it.")
    if settings.format == "onnx":
        require("onnx", "onnxscript")
        if settings.custom_operator:
            raise ConfigError("ONNX has no custom operator: leave it out, or use torch_export.")


def square_side(model: CoDETR) -> int:
    """Side in pixels of the squares that a model pads its images to; 0: it does not."""
    constraints = model.backbone.padding_constraints
    return model.padding.square_size or constraints.get("square_size", 0)


def _image_size(model: CoDETR, wanted: tuple[int, int] | None) -> tuple[int, int] | None:
    side = square_side(model)
    if side:
        if wanted not in (None, (side, side)):
            raise ConfigError(
                f"this model works on squares of {side} pixels: leave the image size out."
            )
        return side, side
    divisor = max(1, model.backbone.size_divisibility)
    if wanted is None and (divisor > 1 or isinstance(model.backbone.bottom_up, SwinTransformer)):
        raise ConfigError(
            "models with Swin and ViT backbones are exported for one size of the network input: "
            "give it with --image-size, as in --image-size 800x1344."
        )
    if wanted is not None and (min(wanted) < 1 or any(length % divisor for length in wanted)):
        raise ConfigError(
            f"the image size {wanted[0]}x{wanted[1]} must be positive and divisible by {divisor}."
        )
    return wanted


def _test_size(cfg: DictConfig) -> tuple[int, int]:
    """Short edge and upper limit of the long one, in pixels, in the evaluation of a config."""
    steps = instantiate(cfg.dataloader.test.mapper.augmentations)
    resize = steps[0] if len(steps) == 1 else None
    if not isinstance(resize, T.ResizeShortestEdge) or len(set(resize.short_edge_length)) != 1:
        raise ExportError(
            "dataloader.test.mapper.augmentations must be one ResizeShortestEdge of one size to "
            "be described in an exported file: change the config."
        )
    return resize.short_edge_length[0], resize.max_size


def _soft_nms(model: CoDETR) -> SoftNMS | None:
    post = model.postprocessor
    if not isinstance(post, SoftNMSPostprocessor):
        return None
    return SoftNMS(post.max_detections, post.iou_threshold, post.min_score, post.sigma)
