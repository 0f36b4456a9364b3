"""When a training saves its checkpoints."""

from __future__ import annotations

from detectron2.engine import HookBase

from co_detr.engine.checkpoint import Checkpointer
from co_detr.engine.checkpoint_files import FINAL, numbered_name, remove_old
from co_detr.engine.joint import raise_jointly
from co_detr.errors import CheckpointError, ConfigError


class CheckpointHook(HookBase):
    """Saves every `period` iterations, where the training is asked to stop, and at its end.

    Has to come behind all hooks that do something at the end of an iteration (evaluation, writers):
    an iteration of which a checkpoint exists is complete, and is not done again by a resumed run.

    Belongs into every process. Only the main one writes, but if that fails, all stop.

    Args:
        checkpointer: with the trainer among its checkpointables.
        period: iterations between two checkpoints.
        max_to_keep: numbered checkpoints that stay; an older one is removed only when a newer one
            is on the disk. None: all.

    Raises:
        ConfigError: if `period` or `max_to_keep` is below 1.
    """

    def __init__(self, checkpointer: Checkpointer, period: int, max_to_keep: int | None) -> None:
        for name, value in (("period", period), ("max_to_keep", max_to_keep)):
            if value is not None and value < 1:
                raise ConfigError(f"train.checkpointer.{name}={value} must be at least 1.")
        self.checkpointer = checkpointer
        self.period = period
        self.max_to_keep = max_to_keep

    def after_step(self) -> None:
        iteration = self.trainer.iter
        is_last = iteration + 1 == self.trainer.max_iter
        if (iteration + 1) % self.period == 0 or (self.trainer.stopping and not is_last):
            name = numbered_name(iteration)
            self._save(name)
            if self.max_to_keep is not None and self.checkpointer.save_to_disk:
                remove_old(self.checkpointer.save_dir, f"{name}.pth", self.max_to_keep)
        if is_last:
            self._save(FINAL.removesuffix(".pth"))

    def _save(self, name: str) -> None:
        problem = None
        try:
            self.checkpointer.save(name, iteration=self.trainer.iter)
        except CheckpointError as error:
            problem = error
        raise_jointly(problem)
