"""Where configs are, and where processes that tests start find modules."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
_PARTS = ("common", "models")  # folders of what configs are made of


def experiments(*families: str) -> dict[str, Path]:
    """Configs of a run by their names: of these families, or all."""
    paths = [*CONFIGS.glob("*.py"), *CONFIGS.glob("*/*.py")]
    return {
        path.stem: path
        for path in sorted(paths, key=lambda path: path.stem)
        if path.parent.name not in _PARTS and (not families or path.parent.name in families)
    }


def config_path(name: str) -> str:
    """The file of a config, whatever family it belongs to."""
    return str(experiments()[name])


def python_path() -> str:
    """A value of PYTHONPATH: this checkout, and what it has already.

    Packages, such as Detectron2, may be installed nowhere else.
    """
    present = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), *([present] if present else [])])
