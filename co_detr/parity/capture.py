"""What modules give while something else runs them."""

from __future__ import annotations

import torch
from torch import Tensor

from co_detr.modeling import CoDETR


class Capture:
    """Keeps the outputs of modules, in call order, while its ``with`` block runs."""

    def __init__(self, *modules: torch.nn.Module):
        self.modules = modules
        self.outputs: list[Tensor] = []

    def __enter__(self) -> Capture:
        self._hooks = [
            module.register_forward_hook(lambda _m, _i, output: self.outputs.append(output))
            for module in self.modules
        ]
        return self

    def __exit__(self, *exc) -> None:
        for hook in self._hooks:
            hook.remove()


def decoder_states(model: CoDETR) -> Capture:
    """Captures what classes and boxes are read from: one ``(B, Q, C)`` per decoder layer."""
    norm = model.decoder.output_norm
    return Capture(*model.decoder.layers) if norm is None else Capture(norm)
