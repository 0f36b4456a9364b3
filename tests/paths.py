"""Where processes that tests start find modules."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def python_path() -> str:
    """A value of PYTHONPATH: this checkout, and what it has already.

    Packages, such as Detectron2, may be installed nowhere else.
    """
    present = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), *([present] if present else [])])
