"""From a trained detector to a file and back: ONNX (.onnx) and torch.export (.pt2)."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import detectron2.data.transforms as T
import torch
from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch.export import ExportedProgram

from co_detr.checkpoint.detector import Detector
from co_detr.data.images import ImageReader
from co_detr.errors import ConfigError, ExportError, first_line
from co_detr.files import written_whole
from co_detr.modeling import CoDETR
from co_detr.modeling.backbones import SwinTransformer
from co_detr.modeling.detectors import DECODER
from co_detr.modeling.postprocess import SoftNMSPostprocessor
from co_detr.tools.export import SUFFIXES
from co_detr.tools.export.graph import (
    INPUTS,
    OUTPUTS,
    Description,
    DetectionGraph,
    Detections,
    SoftNMS,
    smallest_side,
    trace,
)

OPSET = 20  # the lowest whose GridSample has no successor that onnxruntime runs
_DESCRIPTION = "co_detr.json"


@dataclass(frozen=True)
class ExportSettings:
    """Attributes:
    format: of the file.
    image_size: (height, width) in pixels of the network input, to which images are padded, one
        at a time; None: any size and batch, or the square that the model pads to.
    custom_operator: keep this package's operator in a file of torch.export.
    with_masks: export the mask head of a model that has one.
    """

    format: Literal["onnx", "torch_export"]
    image_size: tuple[int, int] | None = None
    custom_operator: bool = False
    with_masks: bool = True


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
    image_format = detector.cfg.dataloader.test.mapper.image_format
    graph = DetectionGraph(model, image_format, settings.with_masks).eval()
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
        masks=tuple(graph.outputs[len(OUTPUTS) :]),
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


def square_side(model: CoDETR) -> int:
    """Side in pixels of the squares that a model pads its images to; 0: it does not."""
    constraints = model.backbone.padding_constraints
    return model.padding.square_size or constraints.get("square_size", 0)


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


def write_onnx(program: ExportedProgram, description: Description, path: Path) -> None:
    """Translates a traced graph of standard operators and writes it whole or not at all."""
    ir, optimizer, _ = require("onnx_ir", "onnxscript.optimizer", "onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own parts
        translated = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=[*OUTPUTS, *description.masks],
            verbose=False,
            # Its rewriting of clamps (onnxscript 0.7.2) loses constants.
            optimize=False,
        )
    model = translated.model
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    model.metadata_props.update(description.to_text())
    model.producer_name = "co_detr"
    content = ir.to_proto(model).SerializeToString()
    with written_whole(str(path), "wb") as file:
        file.write(content)


class OnnxModel:
    """An exported ONNX file in onnxruntime.

    Args:
        providers: of onnxruntime, the best one first.

    Attributes:
        description: what the file says about itself.

    Raises:
        ConfigError: if onnxruntime is not installed.
        ExportError: if the file cannot be loaded, or was not written by `write_onnx`.
    """

    def __init__(self, path: Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        (runtime,) = require("onnxruntime")
        try:
            self._session = runtime.InferenceSession(str(path), providers=list(providers))
        except Exception as error:  # onnxruntime has no common base for its errors
            raise ExportError(
                f"{path} cannot be loaded ({first_line(error)}): export the model again."
            ) from error
        text = self._session.get_modelmeta().custom_metadata_map
        self.description = Description.from_text(text, str(path))

    def __call__(self, images: Tensor, sizes: Tensor) -> Detections:
        """See `DetectionGraph.forward`."""
        arrays = self._session.run(
            [*OUTPUTS, *self.description.masks],
            dict(zip(INPUTS, (images.numpy(), sizes.numpy()), strict=True)),
        )
        return Detections(*map(torch.from_numpy, arrays))


def write_torch(program: ExportedProgram, description: Description, path: Path) -> None:
    """Writes a traced graph whole or not at all."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names the paths of this machine
    extra = {_DESCRIPTION: json.dumps(description.to_text())}
    with written_whole(str(path), "wb") as file:
        torch.export.save(program, file, extra_files=extra)


class TorchModel:
    """An exported .pt2 file, on the CPU.

    Attributes:
        description: what the file says about itself.

    Raises:
        ExportError: if the file cannot be loaded, or was not written by `write_torch`.
    """

    def __init__(self, path: Path) -> None:
        extra = {_DESCRIPTION: ""}
        try:
            program = torch.export.load(path, extra_files=extra)
            text = json.loads(extra[_DESCRIPTION] or "{}")
        except Exception as error:  # a damaged archive can raise anything
            raise ExportError(
                f"{path} cannot be loaded ({first_line(error)}): export the model again."
            ) from error
        self.description = Description.from_text(text, str(path))
        self._run = program.module()

    @torch.no_grad()
    def __call__(self, images: Tensor, sizes: Tensor) -> Detections:
        """See `DetectionGraph.forward`."""
        return Detections(*self._run(images, sizes))


def require(*packages: str) -> list[ModuleType]:
    """Optional packages.

    Raises:
        ConfigError: if one is not installed.
    """
    try:
        return [importlib.import_module(package) for package in packages]
    except ImportError as error:
        raise ConfigError(
            f"ONNX needs packages that cannot be imported ({error}): install them with "
            "pip install onnx onnxruntime onnxscript."
        ) from error
