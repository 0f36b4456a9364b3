"""What happens at every evaluation of a training."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from co_detr.checkpoint.saving import Checkpointer
from co_detr.engine.selection import ModelSelection
from co_detr.engine.trainer import Trainer
from co_detr.engine.validation_loss import ValidationLoss

Metrics = dict[str, float]


class PeriodicEvaluation:
    """Evaluates, logs, and lets the selection decide; to be called in every process.

    Args:
        trainer, checkpointer: of the run.
        model: to evaluate.
        run_evaluation: model -> metrics in the main process, {} in others.
        validation_loss: computes `val_loss/*`; None: it is switched off.
        selection: of the best checkpoint and the end of the training; None: neither.

    Attributes:
        metrics: of the last evaluation, in the main process; without losses.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpointer: Checkpointer,
        model: nn.Module,
        run_evaluation: Callable[[nn.Module], Metrics],
        validation_loss: ValidationLoss | None,
        selection: ModelSelection | None,
    ) -> None:
        self.trainer = trainer
        self.checkpointer = checkpointer
        self.model = model
        self.run_evaluation = run_evaluation
        self.validation_loss = validation_loss
        self.selection = selection
        self.metrics: Metrics = {}
        self._steps = 0

    def __call__(self) -> None:
        storage = get_event_storage()
        # After the last step, the iteration is that of the step that does not come.
        steps = min(storage.iter + 1, self.trainer.max_iter)
        if steps == self._steps:
            return  # the training ended early, after an evaluation of these weights
        self._steps = steps
        self.metrics = self.run_evaluation(self.model)
        losses = {} if self.validation_loss is None else self.validation_loss(self.model)
        # Under Detectron2's names in the history: "bbox/AP50".
        named = {f"bbox/{name}": value for name, value in self.metrics.items()}
        storage.put_scalars(**named, **losses, smoothing_hint=False)
        if self.selection is not None:
            known = {**self.metrics, **losses} if comm.is_main_process() else {}
            self.selection.after_evaluation(steps, known, self.trainer, self.checkpointer)
