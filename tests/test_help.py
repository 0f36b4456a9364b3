"""`--help` answers at once: arguments are parsed before anything slow is loaded."""

import subprocess
import sys

import pytest

from tests.paths import ROOT, python_path

# Loads a script as `python SCRIPT --help` does, and then prints what else was loaded.
LOAD = """
import runpy, sys
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code
print("loaded:", *sorted({{"torch", "detectron2", "matplotlib", "numpy"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("script", ["predict.py", "demo.py", "train_net.py"])
def test_help_loads_nothing_slow(script: str) -> None:
    code = LOAD.format(script=str(ROOT / script))
    environment = {"PYTHONPATH": python_path()}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]
