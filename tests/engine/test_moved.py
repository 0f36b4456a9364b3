"""A config.yaml of an earlier version still names parts that exist."""

from pathlib import Path

import pytest
from detectron2.utils.registry import locate

from co_detr import moved
from co_detr.engine.config import config_content, leaves, load_config
from co_detr.engine.setup import description_of_resumed

CONFIGS = sorted((Path(__file__).parents[1] / "data" / "configs_0.1").glob("*.yaml"))


def test_there_are_configs_of_the_first_version():
    assert len(CONFIGS) == 5


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_target_of_an_old_config_is_found(path):
    targets = [
        value
        for where, value in leaves(config_content(load_config(str(path))))
        if where.endswith("_target_")
    ]
    assert len(targets) > 30
    for target in targets:
        assert callable(locate(target)), target
        assert target == moved.present_name(target)


@pytest.mark.parametrize("old", moved.MOVED)
def test_every_new_name_exists_and_is_final(old):
    new = moved.MOVED[old]
    assert locate(new) is not None
    assert moved.present_name(new) == new


def test_the_longest_prefix_decides_and_what_lies_below_moves_along(monkeypatch):
    monkeypatch.setattr(moved, "MOVED", {"a.b": "x", "a.b.c": "y.z"})
    assert moved.present_name("a.b.d.E") == "x.d.E"
    assert moved.present_name("a.b.c.E") == "y.z.E"
    assert moved.present_name("a.bc.E") == "a.bc.E"


def test_a_class_as_a_value_moves_too(tmp_path, monkeypatch):
    monkeypatch.setitem(moved.MOVED, "torch.nn.old.Linear", "torch.nn.Linear")
    text = CONFIGS[0].read_text() + "\n"
    text = text.replace("model:\n", "model:\n  norm: !!python/name:torch.nn.old.Linear ''\n")
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(str(tmp_path / "config.yaml")).model.norm.__name__ == "Linear"


def test_a_resumed_run_does_not_call_a_moved_name_another_setting(tmp_path, caplog):
    (tmp_path / "config.yaml").write_text(CONFIGS[0].read_text())
    cfg = load_config(str(CONFIGS[0]))
    caplog.set_level("INFO")
    description_of_resumed(cfg, str(tmp_path))
    assert "Settings that differ" not in caplog.text
    cfg.train.max_iter += 1
    description_of_resumed(cfg, str(tmp_path))
    assert "Settings that differ" in caplog.text and "_target_" not in caplog.text
