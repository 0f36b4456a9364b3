"""The examples of docs/design.md: each is added to a model, which then trains and detects."""

import re

import pytest
import torch
from detectron2.config import instantiate

from tests.device import DEVICE
from tests.modeling.builders import assert_complete, detect, make_batch, tiny_config, train_step
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "design.md").read_text()
ADDED = {"head": "plain.", "query source": "grid.", "backbone": None}


def example(part: str) -> str:
    """The Python of its section; a name that an example takes from another comes first."""
    (section,) = re.findall(rf"^## Adding a {part}\n(.*?)^## ", PAGE, re.DOTALL | re.MULTILINE)
    return "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))


@pytest.mark.parametrize("part", ADDED)
def test_what_the_page_adds_is_trained_and_detects(part: str) -> None:
    model_node = tiny_config(2).model
    names = {"model": model_node, "__name__": "example_of_the_page"}
    exec("from torch import nn\nfrom detectron2.config import LazyCall as L", names)
    exec(example(part), names)
    torch.manual_seed(0)
    model = instantiate(model_node).to(DEVICE)
    losses = train_step(model, make_batch())
    assert_complete(model, losses)
    prefix = ADDED[part]
    assert prefix is None or any(name.startswith(prefix) for name in losses)
    if part == "query source":
        assert set(re.findall(r"`(\w+\.[\w.]*loss_\w+)`", PAGE)) <= set(losses)
    if part == "head":
        assert any(name.startswith("plain_queries.") for name in losses)
        assert "plain" in model.detectors
        model.evaluate_with = "plain"
    assert len(detect(model, make_batch())) == 2
    if part == "head":
        model.evaluate_with = None
    model.strip_auxiliary()
    assert len(detect(model, make_batch())) == 2
