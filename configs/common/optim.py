"""AdamW of the reference recipe."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params

from co_detr.engine.optim import LearningRateFactor

AdamW = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(
        # params.model is filled in by the trainer
        base_lr="${..lr}",
        weight_decay_norm=None,  # the reference decays norms like everything else
        lr_factor_func=L(LearningRateFactor)(factor=0.1),
    ),
    lr=2e-4,
    betas=(0.9, 0.999),
    weight_decay=1e-4,
)
