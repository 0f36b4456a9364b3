"""The table of models: complete, the same everywhere, and with true numbers of parameters."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from co_detr.model_zoo import ZOO
from co_detr.model_zoo.table import RELEASED

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "list_models.py"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


# By its path: a package that is installed with Detectron2 is called tools, too.
specification = importlib.util.spec_from_file_location("list_models", TOOL)
list_models = sys.modules["list_models"] = importlib.util.module_from_spec(specification)
specification.loader.exec_module(list_models)


def test_the_table_has_every_official_config():
    names = [entry.official_config for entry in RELEASED if entry.official_config]
    assert len(set(names)) == len(names) == 29


def test_the_page_of_models_has_every_one():
    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    rows = {
        row[0]: row for row in (line.strip("| ").split(" | ") for line in lines) if len(row) > 1
    }
    assert {f"`{name}`" for name in ZOO} <= set(rows)
    for entry in RELEASED:
        name, summary, _, _, _, dataset, ap, official, *_ = rows[f"`{entry.name}`"]
        assert (summary, dataset) == (entry.summary, entry.dataset)
        assert ap.strip() == ("" if entry.ap is None else f"{entry.ap:.1f}")
        assert official.strip(" `") == (entry.official_config or "")


@pytest.mark.parametrize("name", ["co_detr_r50", "co_dino_vit_l_o365_12ep", "quickstart"])
def test_documented_numbers_are_those_of_the_tool(name):
    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    assert list_models.markdown_row(ZOO[name], list_models.measure(name)) in lines


def test_parameters_are_those_of_the_official_state_dict():
    file = ROOT / "tests" / "data" / "official_keys_co_deformable_detr_r50.json"
    shapes = json.loads(file.read_text())
    official = sum(
        math.prod(shape) for key, shape in shapes.items() if not key.endswith(STATISTICS)
    )
    counted = list_models.measure("co_detr_r50").training * 1e6
    assert round(counted) == official == 65129894


def test_list_is_printed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["list_models.py", "quickstart"])
    list_models.main()
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "config" and row.split()[0] == "quickstart"
    monkeypatch.setattr("sys.argv", ["list_models.py", "nothing"])
    with pytest.raises(SystemExit):
        list_models.main()
    assert "no model nothing" in capsys.readouterr().err
