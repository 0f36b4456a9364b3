"""Overrides reach every part, and mistakes in them are explained."""

import logging
import typing
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.solver import WarmupParamScheduler
from omegaconf import OmegaConf

from co_detr.engine.config import load_config, suggest_rate
from co_detr.engine.config_yaml import save_config
from co_detr.engine.optim import LearningRateFactor, StepSchedule, WarmUp
from co_detr.engine.overrides import TEXT_OR_NULL, text_override
from co_detr.engine.setup import build_model
from co_detr.engine.tracking import MlflowSettings, WandbSettings
from co_detr.engine.train import run_training
from co_detr.errors import ConfigError
from tests.paths import config_path

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
        (
            "data.xyz=3",
            "data has channels, image_format, invalid_boxes, max_image_pixels, preflight, train",
        ),
        ("train.seed.x=3", "train.seed has no keys."),
        ("train.max_iter", "is not of the form key=value"),
        ("~train.max_iter", "is not of the form key=value"),
        ("train.max_iter=a[b", "is not of the form key=value"),
        ("train.max_iter=1,2", "train.max_iter has several values"),
        ("lr_multiplier.drops=high", "must be a list, such as [a,b]"),
        ("train.amp=null", "would replace a group of keys: name one of these, such as train.amp.e"),
        ("model=small", "would replace a group of keys"),
        ("train.output_dir=", "train.output_dir is empty"),
        (
            "train.output_dir=null",
            "must be a text and cannot be null: write 'train.output_dir=\"nul",
        ),
        ("data.val=NULL", "must be a text and cannot be null"),
        ("data.train_images=[a, b]", "must be a text and not a list: give one value"),
        ("train.wandb.name={a: 1}", "must be a text and not a dict"),
        ("train.device=gpu", "train.device=gpu is no device: set it to cuda or cpu"),
        ("data.train=${data.nothing}", "cannot be applied: Interpolation key 'data.nothing' not"),
        ("data.train=???", "sets no value"),
        ("data.train=\udcff", "is not valid UTF-8"),
        ("train.max_iter=many", "must be a number"),
        ("train.amp.enabled=maybe", "must be true or false"),
        ("train.max_iter=0", "train.max_iter=0 must be a whole number of at least 1"),
        ("train.max_iter=1.5", "train.max_iter=1.5 must be a whole number of at least 1"),
        ("train.seed=-1", "train.seed=-1 must be"),
        ("train.amp.dtype=int8", "train.amp.dtype=int8 must be"),
        ("train.eval_period=-1", "train.eval_period=-1 must be a whole number of at least 0"),
        ("train.eval_period=0.5", "train.eval_period=0.5 must be a whole number of at least 0"),
        ("train.clip_grad.max_norm=0", "train.clip_grad.max_norm=0 must be above 0, or null"),
        ("train.clip_grad.max_norm=-1", "train.clip_grad.max_norm=-1 must be above 0, or null"),
        ("dataloader.train.num_workers=-1", "dataloader.train.num_workers=-1 must be a whole"),
        ("dataloader.test.num_workers=1.5", "dataloader.test.num_workers=1.5 must be a whole"),
        ("data.image_format=rgb", 'data.image_format=rgb must be "RGB" or "BGR"'),
    ],
)
def test_mistaken_overrides(tiny_cfg, override, message):
    with pytest.raises(ConfigError) as caught:
        tiny_cfg(override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "donn\u00e9es/x.json",
            "a=b/",
            "data (1)/",
            "v1#2",
            "it's",
            "run,1",
            "2024",
            "1e3",
            "true",
        ),
        *(
            "a[b]",
            "[1]/x.json",
            "{a}b",
            "a\\b\\",
            "$HOME/x",
            "a: b",
            "50%",
            "'a' or 'b'",
            " x ",
            "@x",
        ),
        *("off", "choice(a,b)", "C:\\data", '"a"b"', "+1", "a;b", "a&b", "x=~/y"),
    ],
)
def test_text_is_taken_as_it_is(tiny_cfg, text):
    keys = ("data.train", "data.val_images", "train.output_dir", "train.init_checkpoint")
    # Also keys that are null or an argument's default, and one that refers to another key.
    keys += ("train.wandb.name", "train.mlflow.tracking_uri", "train.mlflow.experiment")
    keys += ("dataloader.evaluator.output_dir", "dataloader.test.dataset.image_root")
    cfg = tiny_cfg(*(f"{key}={text}" for key in keys))
    assert [OmegaConf.select(cfg, key) for key in keys] == [text] * len(keys)


@pytest.mark.parametrize(
    ("value", "text"),
    [("'a, b'", "a, b"), ('"null"', "null"), ('"[a]"', "[a]"), ("'it\\'s'", "it's"), ('""', "")],
)
def test_quotation_marks_around_the_whole_text_are_taken_off(tiny_cfg, value, text):
    cfg = tiny_cfg(f"data.train={value}", f"train.wandb.project={value}")
    assert (cfg.data.train, cfg.train.wandb.project) == (text, text)


def test_the_home_folder_is_put_in(tiny_cfg, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = tiny_cfg("data.train=~/x.json", "train.output_dir=~", "data.val='~/x.json'")
    assert (cfg.data.train, cfg.train.output_dir) == ("/home/me/x.json", "/home/me")
    assert cfg.data.val == "~/x.json"


def test_null_where_a_text_may_be_left_out(tiny_cfg):
    for key in TEXT_OR_NULL:
        assert OmegaConf.select(tiny_cfg(f"{key}=null"), key) is None
    assert tiny_cfg("dataloader.evaluator.output_dir=null").dataloader.evaluator.output_dir is None
    assert set(TEXT_OR_NULL) >= {
        f"train.{node}.{name}"
        for node, settings in (("wandb", WandbSettings), ("mlflow", MlflowSettings))
        for name, hint in typing.get_type_hints(settings).items()
        if hint == str | None
    }


@pytest.mark.parametrize(
    "text", ["a b", "null", "~/x", 'a"b', "a\\", '\\\\"', "[a]", "'x'", '"x"', "it's"]
)
def test_any_text_can_be_written_as_an_override(tiny_cfg, text):
    assert tiny_cfg(text_override("train.output_dir", text)).train.output_dir == text


def test_a_run_in_a_folder_with_such_a_name(tiny_cfg, tiny_data, tmp_path):
    """From the command line to config.yaml and back."""
    odd = tmp_path / "donn\u00e9es (1), it's #2=x"
    odd.mkdir()
    tiny_data.train.rename(odd / "train.json")
    overrides = [f"data.train={odd / 'train.json'}", f"train.output_dir={odd / 'a,b=c'}"]
    run_training(tiny_cfg(*overrides, "train.max_iter=1"), resume=False)
    again = load_config(str(odd / "a,b=c" / "config.yaml"))
    assert again.data.train == str(odd / "train.json")


def test_wrong_types_in_a_config_file(tiny_cfg, tmp_path):
    for key, value in (("train.output_dir", 2024), ("data.val", None), ("train.device", [])):
        cfg = tiny_cfg()
        OmegaConf.update(cfg, key, value, merge=False)
        save_config(cfg, str(tmp_path / "config.yaml"))
        with pytest.raises(ConfigError, match=rf"{key}=.* must be a text"):
            load_config(str(tmp_path / "config.yaml"))


def test_whole_numbers_may_be_written_with_an_exponent(tiny_cfg):
    assert tiny_cfg("train.max_iter=1e3").train.max_iter == 1000


def test_a_saved_config_keeps_the_order_of_the_heads(tmp_path):
    """A run that is resumed from its config.yaml has its parameters in the same order."""
    cfg = load_config(config_path("quickstart"))
    save_config(cfg, str(tmp_path / "config.yaml"))
    again = load_config(str(tmp_path / "config.yaml"))
    names = [
        [name for name, _ in instantiate(config.model).named_parameters()]
        for config in (cfg, again)
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
    assert factor("queries.matching.reference_points.weight") == 0.1
    assert factor("decoder.layers.0.cross_attention.value_proj.bias") == 1.0


def test_layers_learn_the_slower_the_nearer_to_the_image():
    factor = LearningRateFactor(factor=0.4, layer_decay=0.5, depths=[1, 2])
    for name, power in {
        "stem.conv1.weight": 4,
        "patch_embed.proj.weight": 4,
        "res2.0.conv1.weight": 3,
        "res3.1.conv3.norm.weight": 1,
        "layers.0.blocks.0.attn.qkv.weight": 3,
        "layers.0.downsample.reduction.weight": 3,  # Detectron2's, behind the stage
        "layers.1.blocks.0.norm1.weight": 2,
        "norm1.weight": 0,
        "body.stages_1.downsample.0.weight": 2,  # timm's, in front of the stage
        "body.stages_1.blocks.1.conv_dw.weight": 1,
        "body.layer1.0.conv1.weight": 3,
    }.items():
        assert factor(f"backbone.bottom_up.{name}") == pytest.approx(0.4 * 0.5**power), name
    assert factor("encoder.layers.0.blocks.0.weight") == 1.0
    with pytest.raises(
        ConfigError, match=r"depths=\[1, 2\] has no place for .*res4.0.conv1.weight"
    ):
        factor("backbone.bottom_up.res4.0.conv1.weight")
    with pytest.raises(ConfigError, match="cannot tell which layer .*h.3.weight is of"):
        factor("backbone.bottom_up.h.3.weight")
    with pytest.raises(ConfigError, match="needs the number of blocks of each stage"):
        LearningRateFactor(layer_decay=0.9)


@pytest.mark.parametrize(
    ("name", "depths", "rates"),
    [
        ("co_detr_r50", [3, 4, 6, 3], 17),  # blocks and stem
        ("co_deformable_detr_swin_t_12ep", [2, 2, 6, 2], 14),  # and the norms of the outputs
        ("co_dino_vit_l_o365_12ep", 24, 26),
    ],
)
def test_every_layer_of_a_backbone_is_known(name, depths, rates):
    cfg = load_config(config_path(name))
    with torch.device("meta"):
        backbone = instantiate(cfg.model.backbone.bottom_up)
    factor = LearningRateFactor(layer_decay=0.9, depths=depths)
    names = [f"backbone.bottom_up.{name}" for name, _ in backbone.named_parameters()]
    assert len(set(map(factor, names))) == rates


def test_layer_decay_of_an_earlier_version_is_read():
    cfg = load_config(str(ROOT / "tests/data/configs_0.1/co_dino_vit_l_o365_12ep.yaml"))
    factor = instantiate(cfg.optimizer.params.lr_factor_func)
    assert factor == LearningRateFactor(factor=1.0, layer_decay=0.8, depths=24)


def test_schedule_drops_at_the_eleventh_of_twelve_epochs():
    schedule = StepSchedule([11 / 12])
    assert schedule(82499 / 90000) == 1.0
    assert schedule(82500 / 90000) == pytest.approx(0.1)
    assert StepSchedule([0.9, 0.5])(0.95) == pytest.approx(0.01)


def test_a_warm_up_is_as_long_as_it_says_whatever_the_training(tmp_path):
    path = config_path("co_dino_vit_l_o365_12ep")
    for max_iter in (90000, 1000, 100):
        cfg = load_config(path, [f"train.max_iter={max_iter}"])
        save_config(cfg, str(tmp_path / "config.yaml"))
        for config in (cfg, load_config(str(tmp_path / "config.yaml"))):
            schedule = instantiate(config.lr_multiplier)
            for iteration in (0, 1, 50, 99):
                where = iteration / max_iter
                expected = (0.01 + 0.99 * iteration / 500) * (0.1 if where >= 7 / 12 else 1)
                assert schedule(where) == pytest.approx(expected, rel=1e-6)
            if max_iter > 500:
                assert schedule(500 / max_iter) == schedule(0.5) == 1.0
                assert schedule(0.9) == pytest.approx(0.1)  # the drops of the schedule behind it


def test_a_warm_up_equals_that_of_detectron2():
    inner = StepSchedule([0.6])
    ours, theirs = WarmUp(inner, 25, 100, 0.1), WarmupParamScheduler(inner, 0.1, 0.25)
    for iteration in range(100):
        assert ours(iteration / 100) == pytest.approx(theirs(iteration / 100), rel=1e-12)


def test_a_saved_warm_up_of_an_earlier_version_still_loads(tmp_path):
    cfg = load_config(config_path("co_detr_r50"))
    cfg.lr_multiplier = LazyCall(WarmupParamScheduler)(
        scheduler=cfg.lr_multiplier, warmup_factor=0.01, warmup_length=0.25
    )
    save_config(cfg, str(tmp_path / "config.yaml"))
    again = load_config(str(tmp_path / "config.yaml"))
    assert instantiate(again.lr_multiplier)(0.0) == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["co_dino_r50", "co_detr_small", "conditional_detr_r50"])
def test_the_path_of_a_config_before_there_were_families_leads_to_it(name, caplog, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = load_config(f"configs/{name}.py")
    assert cfg == load_config(config_path(name))
    (warning,) = [record.getMessage() for record in caplog.records]
    present = Path(config_path(name)).relative_to(ROOT)
    assert warning == f"configs/{name}.py is {present} now: name that one."


@pytest.mark.parametrize("path", ["configs/co_dino_r5.py", "configs/coco.py", "co_dino_r50.py"])
def test_a_path_that_no_config_ever_had(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match="does not exist: pass --config-file configs/FAMILY/NAME"):
        load_config(path)


@pytest.mark.parametrize(
    ("name", "overrides", "with_masks", "keep_masks"),
    [
        ("co_detr_r50", [], False, None),
        ("co_detr_r50_mask_rcnn", [], True, None),
        ("co_detr_r50_mask_rcnn", ["model.auxiliary.roi=null"], False, None),
        ("co_detr_r50_mask_rcnn", ["dataloader.train.dataset.with_masks=false"], False, None),
        ("co_dino_r50_instance", [], True, None),
        ("co_dino_r50_instance", ["model.mask_head=null"], False, None),
        ("co_dino_r50_lsj_12ep", [], True, False),
        ("co_dino_r50_lsj_12ep", ["dataloader.train.copy_paste=null"], False, None),
        ("co_dino_vit_l_o365_lsj_lvis_instance_16ep", [], True, True),
    ],
)
def test_masks_are_read_where_something_learns_or_moves_them(
    name, overrides, with_masks, keep_masks
):
    train = load_config(config_path(name), overrides).dataloader.train
    assert train.dataset.with_masks is with_masks
    assert (train.copy_paste and train.copy_paste.keep_masks) is keep_masks


HEAD = "model.mask_head={_target_: co_detr.modeling.masks.RefineMaskHead}"


@pytest.mark.parametrize(
    ("name", "overrides", "with_masks", "keep_masks"),
    [
        ("co_dino_r50", [], False, (None, False)),
        ("co_dino_r50", [HEAD], True, (None, True)),
        ("co_dino_r50", [HEAD, "dataloader.train.dataset.with_masks=false"], False, (None, True)),
        ("co_dino_r50_lsj_12ep", [HEAD], True, (True, True)),
        ("co_dino_r50_instance", [], True, (None, True)),
    ],
)
def test_a_mask_head_that_is_added_to_a_saved_config_reads_masks(
    name, overrides, with_masks, keep_masks, tmp_path
):
    saved = str(tmp_path / "config.yaml")
    save_config(load_config(config_path(name)), saved)
    train = load_config(saved, overrides).dataloader.train
    assert train.dataset.with_masks is with_masks
    assert (train.copy_paste and train.copy_paste.keep_masks, train.mixing.keep_masks) == keep_masks


def test_what_a_run_without_masks_left_out_stays_out(tmp_path):
    saved = str(tmp_path / "config.yaml")
    off = "dataloader.train.dataset.with_masks=false"
    save_config(load_config(config_path("co_dino_r50_instance"), [off]), saved)
    assert load_config(saved).dataloader.train.dataset.with_masks is False


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        (["train.effective_batch_size=4"], "optimizer.lr=0.0001 is a good"),
        (["train.effective_batch_size=64"], "optimizer.lr=0.0004 is a good"),
        (["train.effective_batch_size=16"], None),
        (["train.effective_batch_size=4", "optimizer.lr=3e-5"], None),
        (["train.seed=1"], None),
    ],
)
def test_a_rate_for_another_batch_is_suggested(monkeypatch, caplog, overrides, rate):
    monkeypatch.setattr(logging.getLogger("co_detr"), "propagate", True)  # off after a run
    path = config_path("co_detr_r50")
    suggest_rate(load_config(path, overrides), path, overrides)
    messages = [record.getMessage() for record in caplog.records]
    assert not messages if rate is None else rate in messages[0] and len(messages) == 1


def test_a_name_is_a_model_of_the_zoo(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart").model.num_classes == 10
    with pytest.raises(ConfigError, match="did you mean co_detr_r50"):
        load_config("co_detr_r5")
    with pytest.raises(ConfigError, match="folder/co_detr_r50' does not exist"):
        load_config("folder/co_detr_r50")


def test_no_rate_is_suggested_for_other_optimizers(tmp_path, caplog, monkeypatch):
    """Whose rule is another one."""
    monkeypatch.setattr(logging.getLogger("co_detr"), "propagate", True)
    cfg = load_config(config_path("co_detr_r50"))
    cfg.optimizer._target_ = "torch.optim.SGD"
    path = str(tmp_path / "sgd.yaml")
    save_config(cfg, path)
    overrides = ["train.effective_batch_size=4"]
    suggest_rate(load_config(path, overrides), path, overrides)
    assert not caplog.records
