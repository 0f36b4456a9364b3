"""What a training run of a tiny model leaves."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from co_detr.engine.config import apply_overrides, load_config
from co_detr.modeling import CoDETR
from tests.device import CHILD
from tests.modeling.builders import shrink
from tests.paths import config_path

CLASSES = ["red cell", "white cell", "platelet", "dust", "bubble"]
SIZE = [
    "dataloader.test.mapper.augmentations.short_edge=96",
    "dataloader.test.mapper.augmentations.max_size=160",
]


@dataclass(frozen=True)
class Run:
    """What training wrote."""

    folder: Path
    cfg: DictConfig
    model: CoDETR

    @property
    def config(self) -> str:
        return str(self.folder / "config.yaml")

    @property
    def checkpoint(self) -> str:
        return str(self.folder / "model_final.pth")


def masked_config() -> DictConfig:
    """As the trained one with a small mask head, and few detections."""
    cfg = shrink(load_config(config_path("co_detr_r50_instance")))
    cfg.model.mask_head.iou_head.update(conv_dim=16, fc_dim=32)
    few = "model.postprocessor.max_detections=15"
    apply_overrides(cfg, [*SIZE, "model.num_classes=5", few, f"train.device={CHILD}"])
    return cfg
