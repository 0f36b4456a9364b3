"""A config of an earlier version still names parts and keys that exist."""

import logging
from pathlib import Path

import pytest
from detectron2.utils.registry import locate

from co_detr import moved
from co_detr.engine import evaluators
from co_detr.engine.config import load_config
from co_detr.engine.config_yaml import config_content, config_text, leaves
from co_detr.engine.setup import description_of_resumed
from co_detr.modeling import auxiliary
from tests.paths import config_path

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "tests" / "data" / "configs_0.1").glob("*.yaml"))


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


def test_a_part_that_moved_and_was_renamed_later(monkeypatch):
    monkeypatch.setattr(moved, "MOVED", {"a.b": "x", "x.Old": "x.New"})
    assert moved.present_name("a.b.Old.method") == "x.New.method"


def test_a_class_as_a_value_moves_too(tmp_path, monkeypatch):
    monkeypatch.setitem(moved.MOVED, "torch.nn.old.Linear", "torch.nn.Linear")
    text = CONFIGS[0].read_text() + "\n"
    text = text.replace("model:\n", "model:\n  norm: !!python/name:torch.nn.old.Linear ''\n")
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(str(tmp_path / "config.yaml")).model.norm.__name__ == "Linear"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_resumed_run_does_not_call_an_old_name_another_setting(path, tmp_path, caplog):
    (tmp_path / "config.yaml").write_text(path.read_text())
    cfg = load_config(str(path))
    caplog.set_level("INFO")
    description_of_resumed(cfg, str(tmp_path))
    assert "Settings that differ" not in caplog.text
    cfg.train.max_iter += 1
    description_of_resumed(cfg, str(tmp_path))
    assert "Settings that differ" in caplog.text and "_target_" not in caplog.text


OLD_KEY, NEW_KEY = "model.decoder.normalise_output", "model.decoder.normalize_output"


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_old_key_of_a_run_is_read_with_one_warning(caplog):
    (path,) = (path for path in CONFIGS if path.stem == "quickstart_co_dino")
    assert "normalise_output: true" in path.read_text()
    decoder = load_config(str(path)).model.decoder
    assert decoder.normalize_output is True and "normalise_output" not in decoder
    (warning,) = warnings_of(caplog)
    assert str(path) in warning and f"{OLD_KEY} is called {NEW_KEY} now" in warning


def test_an_old_key_on_the_command_line_sets_the_new_one(caplog):
    cfg = load_config(config_path("co_dino_r50"), [f"{OLD_KEY}=false"])
    assert cfg.model.decoder.normalize_output is False
    assert "normalise_output" not in cfg.model.decoder
    assert warnings_of(caplog) == [f"{OLD_KEY} is called {NEW_KEY} now: set that one."]


def test_a_key_that_nothing_needs_any_more_does_nothing_on_the_command_line(caplog):
    key = "dataloader.train.mapper.use_instance_mask"
    cfg = load_config(config_path("co_detr_r50_mask_rcnn"), [f"{key}=true"])
    assert "use_instance_mask" not in cfg.dataloader.train.mapper
    assert warnings_of(caplog) == [f"{key} is no key any more, as nothing needs it: leave it out."]


def test_an_old_key_and_an_old_class_in_a_config_in_python(tmp_path, caplog):
    """The value of the old key counts: who set it knew no other."""
    vars(auxiliary).pop("CentreSamplingAssigner", None)  # there after its first import
    config = tmp_path / "config.py"
    config.write_text(
        "from detectron2.config import LazyCall, LazyConfig\n"
        "from co_detr.modeling.auxiliary import CentreSamplingAssigner\n"
        f"cfg = LazyConfig.load({config_path('co_dino_r50')!r})\n"
        "model, optimizer, data = cfg.model, cfg.optimizer, cfg.data\n"
        "lr_multiplier, dataloader, train = cfg.lr_multiplier, cfg.dataloader, cfg.train\n"
        "model.decoder.normalise_output = False\n"
        "model.auxiliary.atss.assigner = LazyCall(CentreSamplingAssigner)(radius=1.5)\n"
    )
    cfg = load_config(str(config))
    assert cfg.model.decoder.normalize_output is False
    assert "auxiliary.CenterSamplingAssigner" in config_text(cfg)
    of_the_class, of_the_key = warnings_of(caplog)
    assert "CentreSamplingAssigner is called CenterSamplingAssigner now" in of_the_class
    assert f"{OLD_KEY} is called {NEW_KEY} now" in of_the_key


@pytest.mark.parametrize("kind", ["Coco", "Lvis"])
def test_evaluators_by_their_old_names(kind, tmp_path, caplog):
    """A finished run goes on without a word; who imports the old name is told the new one."""
    old, new = f"{kind}BoxEvaluator", f"{kind}DetectionEvaluator"
    cfg = load_config(config_path("co_dino_r50"))
    cfg.dataloader.evaluator._target_ = f"co_detr.engine.evaluators.{old}"
    (tmp_path / "config.yaml").write_text(config_text(cfg))
    evaluator = load_config(str(tmp_path / "config.yaml")).dataloader.evaluator
    assert evaluator._target_ == f"co_detr.engine.evaluators.{new}" and not warnings_of(caplog)

    vars(evaluators).pop(old, None)  # there after its first import
    assert getattr(evaluators, old) is getattr(evaluators, old) is getattr(evaluators, new)
    assert warnings_of(caplog) == [f"{old} is called {new} now: import that one."]


@pytest.mark.parametrize("module", [auxiliary, evaluators])
def test_other_names_are_no_names_of_a_module(module):
    with pytest.raises(AttributeError, match="has no attribute 'CentralAssigner'"):
        _ = module.CentralAssigner


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("atss.loss_centreness", "atss.loss_centerness"),
        ("val_loss/fcos.loss_centreness", "val_loss/fcos.loss_centerness"),
        ("loss_centreness", "loss_centerness"),
        ("atss.loss_bbox", "atss.loss_bbox"),
        ("total_loss", "total_loss"),
    ],
)
def test_names_of_losses(old, new):
    assert moved.present_loss(old) == new
