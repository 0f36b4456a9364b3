"""Learning-rate schedule of the reference recipe: 12 epochs, x0.1 after the 11th, no warm-up."""

from detectron2.config import LazyCall as L

from co_detr.engine.optim import StepSchedule

lr_multiplier = L(StepSchedule)(drops=[11 / 12], factor=0.1)
