"""Co-DETR: DETR detectors trained with collaborative hybrid assignments, on Detectron2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from co_detr.tools.export import ExportedPredictor
    from co_detr.tools.predict.predictor import Predictor

__version__ = "0.2.0"
__all__ = ["ExportedPredictor", "Predictor", "__version__"]


def __getattr__(name: str) -> Any:
    # Both load Detectron2 and torch, which not everybody who imports the package needs.
    if name == "Predictor":
        from co_detr.tools.predict.predictor import Predictor

        return Predictor
    if name == "ExportedPredictor":
        from co_detr.tools.export import ExportedPredictor

        return ExportedPredictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
