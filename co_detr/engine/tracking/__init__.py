"""Experiment trackers, for those who switch them on: Weights & Biases and MLflow.

Their packages are not installed with this project. A resumed run goes on in the tracker's run that
it began, whose id is kept in the output folder.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, OmegaConf

from co_detr.engine.tracking.base import ScalarWriter, TrackedRun
from co_detr.engine.tracking.mlflow_writer import MlflowSettings, MlflowWriter
from co_detr.engine.tracking.wandb_writer import WandbSettings, WandbWriter
from co_detr.errors import ConfigError

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
