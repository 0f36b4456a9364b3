"""A tiny detector, its checkpoint, and the files that it is exported to."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from PIL import Image

from co_detr.checkpoint.saving import Checkpointer
from co_detr.engine.config import apply_overrides, load_config
from tests.export.tiny_export import Trained
from tests.modeling.builders import NUM_CLASSES, randomize, shrink
from tests.paths import config_path
from tests.prediction.trained_run import CLASSES, SIZE


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory):
    """Makes a tiny model of an experiment; further arguments are overrides."""

    def make(experiment: str, *overrides: str) -> Trained:
        folder = tmp_path_factory.mktemp(experiment)
        cfg = shrink(load_config(config_path(experiment)))
        cfg.model.encoder.num_layers = cfg.model.decoder.num_layers = 1
        apply_overrides(cfg, [f"model.num_classes={NUM_CLASSES}", *SIZE, *overrides])
        LazyConfig.save(cfg, str(folder / "config.yaml"))
        torch.manual_seed(0)
        model = instantiate(cfg.model)
        randomize(model, scale=0.2)
        Checkpointer(model, str(folder), class_names=CLASSES).save("model_final")
        return Trained(str(folder / "config.yaml"), str(folder / "model_final.pth"))

    return make


@pytest.fixture(scope="session")
def trained(train) -> Trained:
    """Co-Deformable-DETR with both auxiliary heads and a mask head."""
    small = ["model.mask_head.iou_head.conv_dim=16", "model.mask_head.iou_head.fc_dim=32"]
    return train("co_detr_r50_instance", *small)


@pytest.fixture(scope="session")
def onnx_file(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For images of any size, with masks."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    return trained.export(tmp_path_factory.mktemp("onnx") / "tiny.onnx", "onnx")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of several sizes: landscape, portrait, odd."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(80, 60), (50, 71), (97, 97), (200, 100)]):
        pixels = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())
