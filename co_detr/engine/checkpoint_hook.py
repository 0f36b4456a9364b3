"""When a training saves its checkpoints."""

from __future__ import annotations

import os

from detectron2.engine import HookBase

from co_detr.checkpoint.saving import FINAL, Checkpointer, numbered_name, remove_old
from co_detr.engine.launch import jointly, raise_jointly
from co_detr.errors import CheckpointError, ConfigError


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
        for name, value in (("period", period), ("max_to_keep", max_to_keep)):
            if value is not None and value < 1:
                raise ConfigError(f"train.checkpointer.{name}={value} must be at least 1.")
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
