"""Overrides reach every part, and mistakes in them are explained."""

from pathlib import Path

import pytest
from detectron2.config import instantiate

from co_detr.engine.config import load_config, save_config
from co_detr.engine.optim import LearningRateFactor, StepSchedule
from co_detr.engine.run import build_model
from co_detr.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_overrides_reach_every_part(tiny_cfg):
    cfg = tiny_cfg("model.num_classes=3", "train.images_per_gpu=2", "train.seed=7")
    loaders = cfg.dataloader
    assert loaders.train.dataset.num_classes == loaders.test.dataset.num_classes == 3
    assert loaders.train.dataset.annotation_file == cfg.data.train
    assert loaders.evaluator.annotation_file == cfg.data.val
    assert loaders.evaluator.output_dir == cfg.train.output_dir
    assert (loaders.train.images_per_gpu, loaders.train.seed) == (2, 7)


def test_override_of_a_learning_rate_reaches_its_groups(tiny_cfg):
    cfg = tiny_cfg("optimizer.lr=1e-3", "optimizer.params.lr_factor_func.factor=0.5")
    cfg.optimizer.params.model = instantiate(cfg.model)
    optimizer = instantiate(cfg.optimizer)
    rates = sorted(group["lr"] for group in optimizer.param_groups)
    assert rates == pytest.approx([5e-4, 1e-3])


def test_an_argument_left_at_its_default_can_be_overridden(tiny_cfg):
    cfg = tiny_cfg("model.dropout=0.3", "dataloader.test.batch_size=2")
    assert instantiate(cfg.model).dropout.p == 0.3
    assert cfg.dataloader.test.batch_size == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_iters=3", "did you mean train.max_iter?"),
        ("trian.max_iter=3", "did you mean train?"),
        ("model.num_class=3", "did you mean model.num_classes?"),
        ("train.batch_size=3", "did you mean train.effective_batch_size?"),
        ("dataloader.train.total_batch_size=3", "set train.effective_batch_size=3 instead"),
        ("dataloader.train.images_per_gpu=1", "set train.images_per_gpu=1 instead"),
        ("train.images_per_gpu=0", "train.images_per_gpu=0 must be a whole number of at least 1"),
        ("data.xyz=3", "data has image_format, invalid_boxes, max_image_pixels, preflight, train"),
        ("train.seed.x=3", "train.seed has no keys."),
        ("train.max_iter", "is not of the form key=value"),
        ("~train.max_iter", "is not of the form key=value"),
        ("data.train=a[b", "is not of the form key=value"),
        ("train.max_iter=many", "must be a number"),
        ("train.amp.enabled=maybe", "must be true or false"),
        ("train.max_iter=0", "train.max_iter=0 must be a whole number of at least 1"),
        ("train.max_iter=1.5", "train.max_iter=1.5 must be a whole number of at least 1"),
        ("train.seed=-1", "train.seed=-1 must be"),
        ("train.amp.dtype=int8", "train.amp.dtype=int8 must be"),
    ],
)
def test_mistaken_overrides(tiny_cfg, override, message):
    with pytest.raises(ConfigError) as caught:
        tiny_cfg(override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_numbers_may_be_written_with_an_exponent(tiny_cfg):
    assert tiny_cfg("train.max_iter=1e3").train.max_iter == 1000


def test_a_saved_config_keeps_the_order_of_the_heads(tmp_path):
    """A run that is resumed from its config.yaml has its parameters in the same order."""
    cfg = load_config(str(ROOT / "configs" / "quickstart.py"))
    save_config(cfg, str(tmp_path / "config.yaml"))
    again = load_config(str(tmp_path / "config.yaml"))
    names = [
        [name for name, _ in instantiate(each.model).named_parameters()] for each in (cfg, again)
    ]
    assert names[0] == names[1]


def test_missing_and_incomplete_config_files(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(str(tmp_path / "none.py"))
    (tmp_path / "half.py").write_text("model = dict()\ntrain = dict()\n")
    with pytest.raises(ConfigError, match="does not define optimizer, lr_multiplier, dataloader"):
        load_config(str(tmp_path / "half.py"))


def test_missing_device(tiny_cfg, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="set train.device=cpu"):
        build_model(tiny_cfg("train.device=cuda"))


def test_learning_rate_factor_by_name():
    factor = LearningRateFactor()
    assert factor("backbone.bottom_up.stem.conv1.weight") == 0.1
    assert factor("backbone.lateral_convs.0.weight") == 1.0
    assert factor("decoder.layers.0.cross_attention.sampling_offsets.bias") == 0.1
    assert factor("queries.0.reference_points.weight") == 0.1
    assert factor("decoder.layers.0.cross_attention.value_proj.bias") == 1.0


def test_schedule_drops_at_the_eleventh_of_twelve_epochs():
    schedule = StepSchedule([11 / 12])
    assert schedule(82499 / 90000) == 1.0
    assert schedule(82500 / 90000) == pytest.approx(0.1)
    assert StepSchedule([0.9, 0.5])(0.95) == pytest.approx(0.01)
