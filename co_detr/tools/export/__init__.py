"""Trained detectors as files that run elsewhere: ONNX and torch.export."""

from co_detr.tools.export.exporting import ExportSettings, export_detector
from co_detr.tools.export.predictor import ExportedPredictor

__all__ = ["ExportSettings", "ExportedPredictor", "export_detector"]
