"""Weights & Biases."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from co_detr.engine.tracking.base import ScalarWriter, TrackedRun
from co_detr.errors import ConfigError, first_line


@dataclass(frozen=True)
class WandbSettings:
    """The node ``train.wandb``.

    Attributes:
        enabled: whether the run is tracked.
        project, name: of the run; name None: W&B makes one up.
        mode: "online", "offline" (send later with ``wandb sync``); None: W&B's own default.
    """

    enabled: bool = False
    project: str = "co-detr"
    name: str | None = None
    mode: str | None = None


class WandbWriter(ScalarWriter):
    """Weights & Biases."""

    def __init__(self, settings: WandbSettings, tracked: TrackedRun) -> None:
        super().__init__(tracked.window_size)
        import wandb

        kept = tracked.run_file("wandb")
        run_id = kept.run_id or uuid.uuid4().hex[:12]
        try:
            self.run = wandb.init(
                project=settings.project,
                name=settings.name,
                mode=settings.mode,
                dir=tracked.output_dir,
                id=run_id,
                resume="allow",
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"W&B cannot be used ({first_line(error)}): log in with wandb login, or set "
                "train.wandb.mode=offline or train.wandb.enabled=false."
            ) from error
        kept.keep(run_id)
        # A resumed run may have been started with other settings.
        self.run.config.update(tracked.config, allow_val_change=True)

    def log(self, iteration: int, scalars: dict[str, float]) -> None:
        self.run.log(scalars, step=iteration)

    def close(self) -> None:
        self.run.finish()
