"""`--help` answers at once: arguments are parsed before anything slow is loaded."""

import subprocess
import sys

import pytest

from co_detr.command_line import COMMANDS
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
# The same of all subcommands, in one process. NumPy is quick enough for those that read files.
LOAD_COMMANDS = """
import sys
from co_detr.command_line import COMMANDS, main
for name in COMMANDS:
    sys.argv = ["co-detr", name, "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code
    slow = {"torch", "detectron2", "matplotlib", "scipy", "onnx", "timm"} & set(sys.modules)
    if slow:
        sys.exit(f"{name} loads {', '.join(sorted(slow))}")
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("script", ["predict.py", "demo.py", "train_net.py"])
def test_help_loads_nothing_slow(script: str) -> None:
    done = run(LOAD.format(script=str(ROOT / script)))
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]


def test_no_subcommand_loads_anything_slow_for_its_help() -> None:
    done = run(LOAD_COMMANDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: co-detr ") == len(COMMANDS)
