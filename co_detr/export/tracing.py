"""From a module to a graph of PyTorch operators."""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from co_detr.errors import ExportError
from co_detr.export.graph import DetectionGraph
from co_detr.layers.ms_deform_attn_op import KERNEL_DEVICES, standard_operators

# Height and width of the example that is traced where sizes are free. Different, so that they are
# not taken for one size; no pixel of it is computed.
_EXAMPLE = (768, 832)
_FREE_SIZES = {
    "images": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},
    "sizes": {0: Dim.DYNAMIC},
}


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
