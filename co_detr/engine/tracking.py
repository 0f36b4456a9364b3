"""Experiment trackers, for those who switch them on: Weights & Biases and MLflow.

Their packages are not installed with this project. A resumed run goes on in the tracker's run that
it began, whose id is kept in the output folder.
"""

from __future__ import annotations

import logging
import os
import re
import time
import uuid
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, OmegaConf

from co_detr.engine.writers import ScalarWriter
from co_detr.errors import ConfigError, first_line
from co_detr.files import written_whole

logger = logging.getLogger(__name__)

_MLFLOW_LIMIT = 1000  # metrics in one request


class RunFile:
    """Keeps the id of a tracker's run in the output folder.

    Args:
        path: of the file.
        resume: whether to go on with the run of an earlier process.
    """

    def __init__(self, path: str, resume: bool) -> None:
        self.path = path
        self.run_id: str | None = None
        if resume and os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                self.run_id = file.read().strip()

    def keep(self, run_id: str) -> None:
        self.run_id = run_id
        with written_whole(self.path) as file:
            file.write(f"{run_id}\n")


@dataclass(frozen=True)
class TrackedRun:
    """What every tracker is told of a run.

    Attributes:
        output_dir: of the run.
        config: what is worth comparing between runs.
        resume: whether to go on with the run that is kept in the output folder.
        window_size: losses are medians over so many iterations.
    """

    output_dir: str
    config: dict[str, Any]
    resume: bool
    window_size: int

    def run_file(self, tracker: str) -> RunFile:
        """Where the tracker's run id is kept."""
        return RunFile(os.path.join(self.output_dir, f"{tracker}_run.txt"), self.resume)


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


@dataclass(frozen=True)
class MlflowSettings:
    """The node ``train.mlflow``.

    Attributes:
        enabled: whether the run is tracked.
        experiment, name: of the run; name None: MLflow makes one up.
        tracking_uri: server or store; None: MLflow's own default (``MLFLOW_TRACKING_URI``).
    """

    enabled: bool = False
    experiment: str = "co-detr"
    name: str | None = None
    tracking_uri: str | None = None


class MlflowWriter(ScalarWriter):
    """MLflow. A server that fails later costs numbers, not the training."""

    def __init__(self, settings: MlflowSettings, tracked: TrackedRun) -> None:
        super().__init__(tracked.window_size)
        from mlflow import MlflowClient
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        self.metric = Metric
        self.failure = MlflowException
        kept = tracked.run_file("mlflow")
        try:
            self.client = MlflowClient(tracking_uri=settings.tracking_uri)
            if kept.run_id is None:
                kept.keep(self._new_run(settings, tracked.config))
            else:
                self.client.update_run(kept.run_id, status="RUNNING")
        except (MlflowException, ImportError) as error:  # a store may need a package of its own
            raise ConfigError(
                f"MLflow cannot be used ({first_line(error)}): check train.mlflow.tracking_uri, "
                "or set train.mlflow.enabled=false."
            ) from error
        self.run_id = kept.run_id

    def _new_run(self, settings: MlflowSettings, config: dict[str, Any]) -> str:
        experiment = self.client.get_experiment_by_name(settings.experiment)
        if experiment is None:
            experiment_id = self.client.create_experiment(settings.experiment)
        else:
            experiment_id = experiment.experiment_id
        run_id = self.client.create_run(experiment_id, run_name=settings.name).info.run_id
        self.client.log_dict(run_id, config, "config.json")
        return run_id

    def log(self, iteration: int, scalars: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            # Other characters, which a class name may have, are refused.
            self.metric(re.sub(r"[^\w\-. /]", "_", name), value, now, iteration)
            for name, value in scalars.items()
        ]
        try:
            for start in range(0, len(metrics), _MLFLOW_LIMIT):
                part = metrics[start : start + _MLFLOW_LIMIT]
                self.client.log_batch(self.run_id, metrics=part)
        except self.failure as error:
            logger.warning("MLflow lacks iteration %d: %s", iteration, first_line(error))

    def close(self) -> None:
        try:
            self.client.set_terminated(self.run_id)
        except self.failure as error:
            logger.warning("MLflow does not know that the run ended: %s", first_line(error))


# By the node's name in `train`, which is also that of the package.
_TRACKERS = {
    "wandb": (WandbSettings, WandbWriter),
    "mlflow": (MlflowSettings, MlflowWriter),
}


def require_trackers(cfg: DictConfig) -> None:
    """To be called in every process, before anything that takes long.

    Raises:
        ConfigError: if the package of a tracker that is switched on is missing.
    """
    for name, (settings, _) in _TRACKERS.items():
        if settings(**cfg.train.get(name, {})).enabled and find_spec(name) is None:
            error = ConfigError(
                f"train.{name}.enabled=true needs the package {name}, which is not installed: run "
                f"pip install {name}, or set it to false."
            )
            error.joint = True
            raise error


def build_trackers(cfg: DictConfig, resume: bool) -> list[ScalarWriter]:
    """Writers of the trackers that are switched on; to be called in the main process alone.

    Args:
        cfg: the whole config, of which `train`, `data` and the learning rate are tracked, too.
        resume: whether to go on with the run that is kept in the output folder.

    Raises:
        ConfigError: if a tracker cannot be reached.
    """
    writers = []
    for name, (settings_class, writer) in _TRACKERS.items():
        settings = settings_class(**cfg.train.get(name, {}))
        if settings.enabled:
            output_dir, window_size = cfg.train.output_dir, cfg.train.log_period
            tracked = TrackedRun(output_dir, _tracked_config(cfg), resume, window_size)
            writers.append(writer(settings, tracked))
    return writers


def _tracked_config(cfg: DictConfig) -> dict[str, Any]:
    tracked = OmegaConf.to_container(OmegaConf.masked_copy(cfg, ["train", "data"]), resolve=True)
    return {**tracked, "lr": cfg.optimizer.get("lr")}
