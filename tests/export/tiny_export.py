"""What training leaves of a tiny model, to be exported."""

from dataclasses import dataclass
from pathlib import Path

from co_detr.checkpoint.detector import load_detector
from co_detr.tools.export.exporting import ExportSettings, export_detector
from co_detr.tools.predict.predictor import Predictor


@dataclass(frozen=True)
class Trained:
    """Config and checkpoint of a model with random weights."""

    config: str
    checkpoint: str

    def export(self, path: Path, *settings) -> Path:
        export_detector(
            load_detector(self.config, self.checkpoint), "tiny.py", path, ExportSettings(*settings)
        )
        return path

    def predictor(self) -> Predictor:
        return Predictor(self.config, self.checkpoint, device="cpu")
