"""ONNX files: written from a traced graph, run by onnxruntime."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.export import ExportedProgram

from co_detr.errors import ConfigError, ExportError, first_line
from co_detr.export.description import Description
from co_detr.export.graph import INPUTS, OUTPUTS, Detections
from co_detr.files import written_whole

OPSET = 20  # the lowest whose GridSample has no successor that onnxruntime runs


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
            "pip install -r requirements-export.txt."
        ) from error


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
            output_names=OUTPUTS,
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
            list(OUTPUTS), dict(zip(INPUTS, (images.numpy(), sizes.numpy()), strict=True))
        )
        return Detections(*map(torch.from_numpy, arrays))
