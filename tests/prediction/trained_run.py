"""What a training run of a tiny model leaves."""

from dataclasses import dataclass
from pathlib import Path

from detectron2.config import LazyConfig
from omegaconf import DictConfig

from co_detr.modeling import CoDETR
from tests.device import CHILD
from tests.modeling.builders import CONFIGS, tiny_config

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
    """Both auxiliary heads, a small mask head, few detections."""
    few = "model.postprocessor.max_detections=15"
    cfg = tiny_config(2, [*SIZE, few, f"train.device={CHILD}"])
    parts = LazyConfig.load(str(CONFIGS / "models" / "mask_head.py"))
    head = cfg.model.mask_head = parts.mask_head_of_four_levels
    head.iou_head.update(conv_dim=16, fc_dim=32)
    return cfg
