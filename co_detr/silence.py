"""Silences messages of dependencies that a user of this project can do nothing about."""

from __future__ import annotations

import logging
import warnings

# Detectron2 and fvcore use what newer releases of torch and setuptools deprecate.
DEPRECATIONS = (
    r"`torch\.jit\.",
    r"torch\.meshgrid: in an upcoming release",
    r".*pkg_resources is deprecated",
)
# Loggers that warn about tracing through deprecated checks and about machines without a GPU.
LOGGERS = ("torch.fx._symbolic_trace", "torch.utils.cpp_extension")


def silence_dependencies() -> None:
    """To be called before Detectron2 is imported."""
    for message in DEPRECATIONS:
        warnings.filterwarnings("ignore", message=message)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
