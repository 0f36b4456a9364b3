"""Learning-rate schedule of the reference recipe: 12 epochs, x0.1 after the 11th, no warm-up."""

from detectron2.config import LazyCall as L

from co_detr.engine.optim import StepSchedule, WarmUp

# Iterations of one epoch at total batch 16.
COCO = 7500  # 118 287 images, rounded up as in Detectron2's schedules
LVIS = 6261  # 100 170 images, each once

lr_multiplier = L(StepSchedule)(drops=[11 / 12], factor=0.1)


def set_epochs(train, lr_multiplier, epochs, drops, iterations=COCO):
    """Trains for `epochs` of `iterations` each; the rate drops after the epochs `drops`."""
    train.max_iter = epochs * iterations
    train.eval_period = iterations
    lr_multiplier.drops = [drop / epochs for drop in drops]


def warmed_up(lr_multiplier, iterations=500, factor=0.01):
    """The schedule with a linear warm-up of `iterations` in front, from `factor` times the rate."""
    return L(WarmUp)(
        scheduler=lr_multiplier,
        iterations=iterations,
        max_iter="${train.max_iter}",
        factor=factor,
    )
