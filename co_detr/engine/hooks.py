"""What happens between the steps of a training: averaged weights, checkpoints and evaluations.

The order of the hooks matters, see `co_detr.engine.train`: first what belongs to an iteration
(averaging, schedule, writers), then its checkpoint, then an evaluation, which may fail.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from omegaconf import DictConfig
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from co_detr.checkpoint.saving import FINAL, Checkpointer, numbered_name, remove_old
from co_detr.engine.evaluation import EvaluationStopped, logged_name
from co_detr.engine.launch import jointly, raise_jointly
from co_detr.engine.setup import RunLog
from co_detr.engine.trainer import Trainer
from co_detr.engine.validation import ModelSelection, ValidationLoss
from co_detr.engine.writers import WriterHook
from co_detr.errors import CheckpointError, ConfigError, UserError, require_whole

logger = logging.getLogger(__name__)

Metrics = dict[str, float]


class BeginHook(HookBase):
    """Lets a run change its folder as soon as it has something to put there, and not before.

    That is behind its first step, or before an evaluation if there is nothing to train. Has to be
    the first hook, in every process.

    Args:
        begin: is called once in the main process.
        output_dir, log: all processes write their messages from then on.
    """

    def __init__(self, begin: Callable[[], None], output_dir: str, log: RunLog | None) -> None:
        self._begin = begin
        self._output_dir = output_dir
        self._log = log
        self._has_begun = False

    def before_train(self) -> None:
        if self.trainer.evaluation_pending or self.trainer.start_iter >= self.trainer.max_iter:
            self._once()

    def after_step(self) -> None:
        self._once()

    def _once(self) -> None:
        if self._has_begun:
            return
        self._has_begun = True
        jointly(self._begin)
        if self._log is not None:
            self._log.open(self._output_dir)


@dataclass(frozen=True)
class EmaSettings:
    """The node ``train.ema``.

    Attributes:
        enabled: whether weights are averaged.
        decay: share of the average that stays in a step, in the long run.
        warmup_iterations: steps in which the decay grows to 63 % of that; 0: it is constant.
            Otherwise the first, bad weights would stay in the average for 1 / (1 - decay) steps.

    Raises:
        ConfigError: if a number is out of its range.
    """

    enabled: bool = False
    decay: float = 0.9997
    warmup_iterations: int = 2000

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"train.ema.decay={self.decay} must be at least 0 and below 1.")
        require_whole("train.ema.warmup_iterations", self.warmup_iterations, least=0)


class AveragedWeights(AveragedModel):
    """torch's `AveragedModel` with a decay that warms up. Buffers are copied, not averaged.

    Its state in a checkpoint (`n_averaged`, `module.*`) is all that it continues from.

    Args:
        model: not wrapped for several processes; all of them make the same average.
        settings: of the decay.
    """

    def __init__(self, model: nn.Module, settings: EmaSettings) -> None:
        super().__init__(model)
        self.settings = settings
        self.requires_grad_(False).eval()

    def decay(self) -> float:
        """Of the next step."""
        warmup, steps = self.settings.warmup_iterations, int(self.n_averaged)
        grown = 1 - math.exp(-steps / warmup) if warmup else 1.0
        return self.settings.decay * grown

    def start_from(self, model: nn.Module) -> None:
        """To be called when the weights are loaded: without a step, the average is the model."""
        if self.n_averaged == 0:
            self.module.load_state_dict(model.state_dict())

    def update_parameters(self, model: nn.Module) -> None:
        self.multi_avg_fn = get_ema_multi_avg_fn(self.decay())
        super().update_parameters(model)


class EmaHook(HookBase):
    """Updates the average after every optimizer step; before hooks that save or evaluate."""

    def __init__(self, averaged: AveragedWeights, model: nn.Module) -> None:
        self.averaged = averaged
        self.model = model

    def before_train(self) -> None:
        if self.trainer.start_iter > 0 and self.averaged.n_averaged == 0:
            logger.warning(
                "The checkpoint has no averaged weights: the average starts from its weights."
            )

    def after_step(self) -> None:
        self.averaged.update_parameters(self.model)


def build_averaged(model: nn.Module, cfg: DictConfig) -> AveragedWeights | None:
    """The average that `train.ema` asks for; None: it asks for none."""
    settings = EmaSettings(**cfg.train.get("ema", {}))
    return AveragedWeights(model, settings) if settings.enabled else None


class CheckpointHook(HookBase):
    """Saves every `period` iterations, before an evaluation, where the training stops, at its end.

    Has to come behind the hooks that belong to an iteration (averaging, schedule, writers): an
    iteration of which a checkpoint exists is not done again by a resumed run. And before the
    evaluation, which takes long and runs much code that trains nothing: whatever happens in it,
    the training is on the disk. Such a checkpoint says that the evaluation is to be made
    (`Trainer.evaluation_pending`), and a run that is resumed from it begins with that; if the
    evaluation had been finished, it gives the same once more.

    Belongs into every process. Only the main one writes, but if that fails, all stop.

    Args:
        checkpointer: with the trainer among its checkpointables.
        period: iterations between two checkpoints.
        max_to_keep: numbered checkpoints that stay; an older one is removed only when a newer one
            is on the disk. None: all.
        eval_period: iterations between two evaluations; 0: only at the end.

    Raises:
        ConfigError: if `period` or `max_to_keep` is below 1.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        period: int,
        max_to_keep: int | None,
        eval_period: int = 0,
    ) -> None:
        require_whole("train.checkpointer.period", period)
        require_whole("train.checkpointer.max_to_keep", max_to_keep, or_null="for all")
        self.checkpointer = checkpointer
        self.period = period
        self.max_to_keep = max_to_keep
        self.eval_period = eval_period
        self._has_final = False

    def before_train(self) -> None:
        self._has_final = os.path.basename(self.checkpointer.resumed_from) == FINAL

    def after_step(self) -> None:
        self._has_final = False
        iteration = self.trainer.iter
        steps = iteration + 1
        is_last = steps == self.trainer.max_iter
        # That behind the last iteration is not in the way of anything: a resumed run makes it.
        evaluates = self.eval_period > 0 and steps % self.eval_period == 0 and not is_last
        self.trainer.evaluation_pending = evaluates
        if steps % self.period == 0 or evaluates or (self.trainer.stopping and not is_last):
            name = numbered_name(iteration)
            self._save(name)
            self._remove_old(name)
        if is_last:
            self._save_final()

    def after_train(self) -> None:
        # An evaluation may have ended the training early.
        if not self._has_final:
            self._save_final()

    def _remove_old(self, newest: str) -> None:
        folder, limit = self.checkpointer.save_dir, self.max_to_keep
        if limit is not None:
            jointly(lambda: remove_old(folder, f"{newest}.pth", limit))

    def _save_final(self) -> None:
        self._save(FINAL.removesuffix(".pth"))
        self._has_final = True

    def _save(self, name: str) -> None:
        problem = None
        try:
            self.checkpointer.save(name, iteration=self.trainer.last_iteration)
        except CheckpointError as error:
            problem = error
        raise_jointly(problem)


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
        named = {logged_name(name): value for name, value in self.metrics.items()}
        storage.put_scalars(**named, **losses, smoothing_hint=False)
        if self.selection is not None:
            known = {**self.metrics, **losses} if comm.is_main_process() else {}
            self.selection.after_evaluation(steps, known, self.trainer, self.checkpointer)


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
