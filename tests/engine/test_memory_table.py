"""What is counted is what tensors take, and what is printed is what is counted."""

import pytest
import torch
from detectron2.config import instantiate

from co_detr.engine.config import load_config
from co_detr.engine.freezing import freeze
from co_detr.engine.memory_table import LiveBytes, MemoryTable, Need, count_step, memory_table
from tests.modeling.builders import shrink
from tests.paths import config_path

pytestmark = pytest.mark.cpu_only("it counts on the CPU")


def test_bytes_of_living_tensors():
    weight = torch.rand(1000, requires_grad=True)
    live = LiveBytes()
    with live:
        live.ignore([weight])
        doubled = weight * 2  # 4000 bytes
        squared = doubled * doubled  # 4000 more; keeps `doubled`
        total = squared.sum()
        view = squared[:10]
        assert live.now == 8004
        del squared
        assert live.now == 8004  # the view keeps it
        del view
        assert live.now == 4004
        del doubled
        assert live.now == 4004  # kept for the backward pass
        total.backward()
        assert live.now == 4004  # the gradient in place of it
        weight.grad = None
    assert live.peak >= 12000


@pytest.fixture(scope="module")
def cfg():
    cfg = shrink(load_config(config_path("quickstart")))
    cfg.model.num_classes = 5
    return cfg


@pytest.fixture(scope="module")
def table(cfg):
    return memory_table(cfg)


def test_a_frozen_backbone_saves_what_is_printed(cfg, table):
    assert table.counted == ((128, 192), (192, 256)) and table.size == (192, 256)
    plain, frozen = (
        next(row for row in table.rows if row.frozen == value and not (row.amp + row.checkpointing))
        for value in (False, True)
    )
    model = instantiate(cfg.model)
    backbone = [value for value in model.backbone.bottom_up.parameters() if value.requires_grad]
    # Gradient and two moments, each a float32.
    assert plain.fixed - frozen.fixed == 12 * sum(value.numel() for value in backbone)
    assert plain.per_image == count_step(model, 192, 256, cfg.model)  # the size is counted itself
    freeze(model, ["backbone.bottom_up"])
    assert frozen.per_image == count_step(model, 192, 256, cfg.model) < plain.per_image
    assert all(value.grad is None for value in model.parameters())


def test_memory_grows_with_the_area(cfg):
    """So that small images tell of large ones."""
    model = instantiate(cfg.model)
    sizes = (128, 192), (192, 256), (384, 512)
    small, usual, large = (count_step(model, *size, cfg.model) for size in sizes)
    slope = (usual - small) / (192 * 256 - 128 * 192)
    told = usual + slope * (384 * 512 - 192 * 256)
    assert large > 2 * usual and told == pytest.approx(large, rel=0.1)


def test_rows_become_lines():
    gib = 2**30
    rows = (Need(2 * gib, 3 * gib), Need(1 * gib, 4e9, frozen=True, amp=True))
    text = MemoryTable(rows, ((128, 192),), (800, 1333), ("Not counted: x",)).text()
    first, second, note = text.splitlines()[-3:]
    # 80 % of 8, 16, 24, 48 GB, less 2.15 GB, in parts of 3.22 GB.
    assert [int(cell) for cell in first.split("|")[-5:-1]] == [1, 3, 5, 11]
    assert [cell.strip() for cell in second.split("|")[1:5]] == ["yes", "", "yes", "1.00"]
    assert "800x1333" in text and note == "Not counted: x"
