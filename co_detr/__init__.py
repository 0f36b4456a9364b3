"""Co-DETR: DETR detectors trained with collaborative hybrid assignments, on Detectron2."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from co_detr.tools.export.predictor import ExportedPredictor
    from co_detr.tools.predict.predictor import Predictor

__version__ = "0.2.0"
__all__ = ["ExportedPredictor", "Predictor", "__version__"]

WITHOUT_DETECTRON2 = (
    "Detectron2, which co_detr is built on, is not installed: run `co-detr install-detectron2`, "
    "which adds it to this environment without a compiler."
)


_SCRIPTS = {"train": "train_net.py", "predict": "predict.py"}


def script(command: str) -> str | None:
    """The path of the repository's script for "train" or "predict"; None: the package is installed
    without the repository."""
    above = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.path.join(above, _SCRIPTS[command])
    return path if os.path.isfile(path) else None


def program(command: str) -> list[str]:
    """What a user starts "train" or "predict" with: the script of the repository, or `co-detr`."""
    path = script(command)
    return ["co-detr", command] if path is None else ["python", os.path.basename(path)]


def lacks_detectron2() -> bool:
    """Whether there is no Detectron2 in this environment."""
    return importlib.util.find_spec("detectron2") is None


# The command says it by itself, where it matters.
if os.path.basename(sys.argv[0]) != "co-detr" and lacks_detectron2():
    warnings.warn(WITHOUT_DETECTRON2, stacklevel=2)


def __getattr__(name: str) -> Any:
    # Both load Detectron2 and torch, which not everybody who imports the package needs.
    if name == "Predictor":
        from co_detr.tools.predict.predictor import Predictor

        return Predictor
    if name == "ExportedPredictor":
        from co_detr.tools.export.predictor import ExportedPredictor

        return ExportedPredictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
