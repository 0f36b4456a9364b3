"""Files of torch.export (.pt2)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from co_detr.errors import ExportError, first_line
from co_detr.export.description import Description
from co_detr.export.graph import Detections
from co_detr.files import written_whole

_DESCRIPTION = "co_detr.json"


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
