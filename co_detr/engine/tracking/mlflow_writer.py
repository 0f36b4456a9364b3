"""MLflow."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from typing import Any

from co_detr.engine.tracking.base import ScalarWriter, TrackedRun
from co_detr.errors import ConfigError, first_line

logger = logging.getLogger(__name__)

_MLFLOW_LIMIT = 1000  # metrics in one request


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
