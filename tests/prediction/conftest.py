"""A tiny trained model as a run leaves it: a config file and a checkpoint with class names."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from PIL import Image

from co_detr.checkpoint.saving import Checkpointer
from co_detr.tools.predict.predictor import Predictor
from tests.device import CHILD, NAME
from tests.modeling.builders import randomize, tiny_config, tiny_model
from tests.prediction.trained_run import CLASSES, SIZE, Run, masked_config


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Both auxiliary heads, random weights."""
    folder = tmp_path_factory.mktemp("run")
    cfg = tiny_config(2, [*SIZE, f"train.device={CHILD}"])
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    model = tiny_model(2)
    randomize(model)
    Checkpointer(model, str(folder), class_names=CLASSES).save("model_final")
    return Run(folder, cfg, model)


@pytest.fixture(scope="session")
def predictor(trained: Run) -> Predictor:
    return Predictor(trained.config, trained.checkpoint, device=NAME)


@pytest.fixture(scope="session")
def masked(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same model with a mask head."""
    folder = tmp_path_factory.mktemp("masked")
    cfg = masked_config()
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # not every head finds something in these images
        model = instantiate(cfg.model).to(NAME)
    randomize(model)
    model.load_state_dict(trained.model.state_dict(), strict=False)
    Checkpointer(model, str(folder), class_names=CLASSES).save("model_final")
    return Run(folder, cfg, model)


@pytest.fixture(scope="session")
def predictor_of_masks(masked: Run) -> Predictor:
    return Predictor(masked.config, masked.checkpoint, device=NAME)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with three images, two of one size."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, (width, height) in {"a": (80, 60), "b": (50, 70), "c": (80, 60)}.items():
        pixels = rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{name}.png")
    return folder
