"""From a module to a graph of PyTorch operators."""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch.export import Dim, ExportedProgram

from co_detr.errors import ExportError
from co_detr.export.graph import DetectionGraph
from co_detr.layers.ms_deform_attn_op import KERNEL_DEVICES, standard_operators

# Height and width of the example that is traced without a fixed size, in units of the divisor or
# of 32 pixels. Different, so that they are not taken for one size; no pixel is computed.
_EXAMPLE = (24, 26)


def trace(
    graph: DetectionGraph,
    image_size: tuple[int, int] | None,
    divisor: int,
    custom_operator: bool,
) -> ExportedProgram:
    """Traces the graph for any batch size.

    Args:
        image_size: (height, width) of the input in pixels; None: free.
        divisor: of height and width, where they are free.
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
    batch = Dim.DYNAMIC
    height, width = image_size or (side * max(divisor, 32) for side in _EXAMPLE)
    images = {0: batch}
    if image_size is None:
        images |= {2: _free_side("height", divisor), 3: _free_side("width", divisor)}
    example = (
        torch.zeros(2, 3, height, width, dtype=torch.uint8),
        torch.tensor([[height, width]] * 2),
    )
    operators = contextlib.nullcontext() if custom_operator else standard_operators()
    with operators, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own parts
        try:
            return torch.export.export(
                graph,
                example,
                dynamic_shapes={"images": images, "sizes": {0: batch}},
                strict=False,
            )
        except torch._dynamo.exc.UserError as error:
            if image_size is not None:
                raise
            raise ExportError(
                "this model cannot be exported for images of any size: give the size of the "
                "network input with --image-size, as in --image-size 800x1344."
            ) from error


def _free_side(name: str, divisor: int):
    return Dim.DYNAMIC if divisor == 1 else divisor * Dim(f"{name}_units", min=2)


def smallest_side(program: ExportedProgram) -> int:
    """The smallest height and width in pixels that a traced graph allows."""
    images = next(
        node for node in program.graph.nodes if node.name == program.graph_signature.user_inputs[0]
    )
    smallest = 1
    for side in images.meta["val"].shape[2:]:
        if isinstance(side, torch.SymInt):
            smallest = max(smallest, _lower_bound(program, side))
    return smallest


def _lower_bound(program: ExportedProgram, side: torch.SymInt) -> int:
    expression = side.node.expr
    bounds = {symbol: program.range_constraints[symbol].lower for symbol in expression.free_symbols}
    return int(expression.subs(bounds))
