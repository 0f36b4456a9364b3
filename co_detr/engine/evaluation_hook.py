"""Evaluations in the course of a training."""

from __future__ import annotations

from detectron2.engine import hooks

from co_detr.engine.evaluation import EvaluationStopped


class EvaluationHook(hooks.EvalHook):
    """Detectron2's `EvalHook`, which a signal can cut short.

    The checkpoint that is saved then says so (`Trainer.evaluation_pending`), and the run that goes
    on from it begins with the evaluation.
    """

    def before_train(self) -> None:
        if self.trainer.evaluation_pending:
            # Logged where it belongs, behind the last iteration of the run that was stopped.
            self.trainer.storage.iter = self.trainer.start_iter - 1
            self._do_eval()

    def _do_eval(self) -> None:
        self.trainer.evaluation_pending = False
        try:
            super()._do_eval()
        except EvaluationStopped:
            self.trainer.evaluation_pending = self.trainer.stopping = True
