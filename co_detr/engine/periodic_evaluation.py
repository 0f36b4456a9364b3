"""What happens at every evaluation of a training."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from co_detr.engine.checkpoint import Checkpointer
from co_detr.engine.selection import ModelSelection
from co_detr.engine.trainer import Trainer

Metrics = dict[str, float]


class PeriodicEvaluation:
    """Evaluates, logs, and lets the selection decide; to be called in every process.

    Args:
        trainer, checkpointer: of the run.
        run_evaluation: gives the metrics, in the main process.
        run_validation_loss: gives `val_loss/*`; None: not computed.
        selection: of the best checkpoint and the end of the training; None: neither.

    Attributes:
        metrics: of the last evaluation, in the main process; without losses.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpointer: Checkpointer,
        run_evaluation: Callable[[], Metrics],
        run_validation_loss: Callable[[], Metrics] | None,
        selection: ModelSelection | None,
    ) -> None:
        self.trainer = trainer
        self.checkpointer = checkpointer
        self.run_evaluation = run_evaluation
        self.run_validation_loss = run_validation_loss
        self.selection = selection
        self.metrics: Metrics = {}
        self._steps = 0

    def __call__(self) -> None:
        # After the last step, the trainer's iteration is that of the step that does not come.
        steps = min(self.trainer.iter + 1, self.trainer.max_iter)
        if steps == self._steps:
            return  # the training ended early, after an evaluation of these weights
        self._steps = steps
        self.metrics = self.run_evaluation()
        losses = {} if self.run_validation_loss is None else self.run_validation_loss()
        # Under Detectron2's names in the history: "bbox/AP50".
        named = {f"bbox/{name}": value for name, value in self.metrics.items()}
        get_event_storage().put_scalars(**named, **losses, smoothing_hint=False)
        if self.selection is not None:
            known = {**self.metrics, **losses} if comm.is_main_process() else {}
            self.selection.after_evaluation(steps, known, self.trainer, self.checkpointer)
