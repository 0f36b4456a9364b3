"""Evaluations in the course of a training."""

from __future__ import annotations

import logging
from collections.abc import Callable

from detectron2.engine import hooks

from co_detr.engine.evaluation import EvaluationStopped
from co_detr.engine.writers import WriterHook
from co_detr.errors import UserError

logger = logging.getLogger(__name__)


class EvaluationHook(hooks.EvalHook):
    """Detectron2's `EvalHook`, behind the checkpoint of its iteration (see `CheckpointHook`).

    A signal can cut an evaluation short. What was not finished, for whatever reason, is made up for
    by the run that goes on from the checkpoint.

    Args:
        period: iterations between two evaluations; 0: only at the end.
        evaluation: see `PeriodicEvaluation`.
        writers: write what it has put into the storage.
    """

    def __init__(self, period: int, evaluation: Callable[[], None], writers: WriterHook) -> None:
        super().__init__(period, evaluation)
        self._writers = writers

    def before_train(self) -> None:
        if self.trainer.evaluation_pending:
            # Logged where it belongs, behind the last iteration of the run that was stopped.
            self.trainer.storage.iter = self.trainer.start_iter - 1
            self._do_eval()

    def _do_eval(self) -> None:
        try:
            super()._do_eval()
        except EvaluationStopped:
            self.trainer.evaluation_pending = self.trainer.stopping = True
        except UserError:
            raise
        except Exception:
            logger.error(
                "The evaluation failed. What was trained is saved: the same command with --resume "
                "goes on from it, and makes the evaluation first."
            )
            raise
        else:
            self.trainer.evaluation_pending = False
            self._writers.write()
