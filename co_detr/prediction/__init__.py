"""Running a trained model on images and videos."""

from co_detr.prediction.predictor import Predictor

__all__ = ["Predictor"]
