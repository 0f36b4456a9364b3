"""The notebook of the quick start: its cells run one after the other, as in Jupyter."""

import json
import os
import re
import subprocess
import sys

import pytest

from co_detr.engine.config import load_config
from tests.paths import ROOT, python_path

NOTEBOOK = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "code"]
TINY = {"ITERATIONS": "2", "IMAGES": "8"}


def test_it_has_no_outputs() -> None:
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


def test_it_states_the_length_of_the_quick_start() -> None:
    (stated,) = re.findall(
        r"^ITERATIONS = \d+ .*the quick start has (\d+)$", CELLS[0], re.MULTILINE
    )
    assert int(stated) == load_config(str(ROOT / "configs" / "quickstart.py")).train.max_iter


@pytest.mark.slow
def test_its_cells_run(tmp_path) -> None:
    first, *others = CELLS
    for name, value in TINY.items():
        first, number = re.subn(rf"^{name} = \d+", f"{name} = {value}", first, flags=re.MULTILINE)
        assert number == 1
    # A command that fails says so and returns its exit code, which nobody would see here.
    checked = [
        re.sub(r"^start\(", "assert 0 == start(", cell, flags=re.MULTILINE) for cell in others
    ]
    script = tmp_path / "cells.py"
    script.write_text("\n".join([first, *checked]))
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"^cascade +AP .* detections in the picture$", done.stdout, re.MULTILINE)
    written = {path.name for path in (tmp_path / "output" / "notebook").iterdir()}
    assert {"model_final.pth", "curve.png", "drawn", "evaluation"} <= written
