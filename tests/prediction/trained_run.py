"""What a training run of a tiny model leaves."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from co_detr.modeling import CoDETR

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
