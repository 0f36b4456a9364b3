"""Installs Detectron2 beside this package, unless one is there already.

    co-detr install-detectron2

Detectron2 publishes no packages, and a dependency on somebody else's would overwrite a Detectron2
that a user has built. So this is a command of its own. It takes a prebuilt wheel, checked by hash
(detectron2.txt), and no compiler: Co-DETR does not call Detectron2's compiled part. What Detectron2
itself needs came with this package.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from co_detr.errors import UserError

REQUIREMENT = Path(__file__).with_name("detectron2.txt")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return parser.parse_args(argv)


def installed_detectron2() -> str | None:
    """The folder of the Detectron2 in this environment; a folder of the name here is none."""
    here = ("", os.getcwd())
    found = PathFinder.find_spec("detectron2", [path for path in sys.path if path not in here])
    if found is None:  # an editable installation has a finder of its own
        found = importlib.util.find_spec("detectron2")
    return os.path.dirname(found.origin) if found is not None and found.origin else None


def run(args: argparse.Namespace) -> None:
    """Installs it.

    Raises:
        UserError: if pip is missing or fails, or the Detectron2 that there is does not work.
    """
    folder = installed_detectron2()
    if folder is not None:
        print(f"Detectron2 is in {folder}, and stays as it is.")
    else:
        _install()
    check = [sys.executable, "-c", "import detectron2.config, detectron2.model_zoo"]
    tried = subprocess.run(check, capture_output=True, text=True, cwd="/")
    if tried.returncode:
        raise UserError(
            "this Detectron2 cannot be imported "
            f"({(tried.stderr.strip().splitlines() or ['no message'])[-1]}): repair or remove it, "
            "then run co-detr install-detectron2 again."
        )
    if folder is None:
        print("Detectron2 is installed.")


def _install() -> None:
    # Not importlib.util.find_spec, which makes setuptools let go of distutils, as in pip itself.
    if PathFinder.find_spec("pip") is None:
        raise UserError(
            "this environment has no pip to install Detectron2 with: add it "
            "(python -m ensurepip), or install Detectron2 yourself."
        )
    # The wheel is tagged for Python 3.10; --target is what lets pip install it on another Python.
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--python-version", "3.10"]
    target = sysconfig.get_paths()["purelib"]
    options += ["--upgrade", "--target", target, "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "install", *options, "-r", str(REQUIREMENT)]
    if subprocess.run(command).returncode:
        raise UserError(
            "pip could not install Detectron2; its message is above. Check the network and the "
            f"free disk space, or install Detectron2 into {target} by other means."
        )
