"""Learning rates that fall with the distance of a transformer block from the heads."""

from __future__ import annotations

from dataclasses import dataclass

from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate


@dataclass(frozen=True)
class LayerDecay:
    """`lr_factor_func` of Detectron2's `get_default_optimizer_params`, as an object, so that
    configs can be saved as YAML and changed from the command line.

    Block i of `num_layers` learns with `decay_rate ** (num_layers - i)` times the base rate, the
    patch and position embeddings with `decay_rate ** (num_layers + 1)`, and all else (the
    backbone's last norm, the pyramid, the transformer, the heads) with the base rate itself.
    """

    decay_rate: float
    num_layers: int

    def __call__(self, name: str) -> float:
        return get_vit_lr_decay_rate(name, self.decay_rate, self.num_layers)
