"""Backbones of timm: their maps, a training step in a model, and the weights that timm loads."""

import logging
from functools import partial

import pytest
import timm
import torch
from detectron2.config import instantiate
from detectron2.modeling import Backbone
from safetensors.torch import save_file

from co_detr.checkpoint.saving import Checkpointer
from co_detr.engine.config import load_config
from co_detr.engine.config_yaml import config_text, save_config
from co_detr.engine.optim import LearningRateFactor
from co_detr.errors import CheckpointError, ConfigError
from co_detr.modeling.backbones import TimmBackbone
from co_detr.modeling.backbones.timm import pixel_mean
from co_detr.tools.predict.predictor import Predictor
from tests.device import DEVICE, NAME
from tests.modeling.backbone_builders import backbone_node
from tests.modeling.builders import (
    assert_complete,
    detect,
    make_batch,
    randomize,
    shrink,
    tiny_config,
    train_step,
)
from tests.paths import config_path

ODD_SIZES = ((75, 97), (64, 110))
CONFIG = "co_detr_convnext_t"
TINY_DINOV3 = {"embed_dim": 32, "depth": 3, "num_heads": 2}
MAPS = {  # strides of the maps, and what they are called
    "test_convnext": {"c2": 4, "c3": 8, "c4": 16, "c5": 32},
    "test_resnet": {"c1": 2, "c2": 4, "c3": 8, "c4": 16, "c5": 32},
    "test_vit": {"last": 16},
    "vit_small_patch16_dinov3": {"last": 16},
}


def timm_backbone(name: str, **settings) -> TimmBackbone:
    if "dinov3" in name:
        settings = {"model_options": TINY_DINOV3} | settings
    torch.manual_seed(0)
    return TimmBackbone(name=name, **settings).to(DEVICE)


def model_config(name: str, **settings):
    """A plain detector on a tiny backbone of timm."""
    cfg = tiny_config(heads=0)
    of_vit = "vit" in name
    backbone = backbone_node("pyramid_on_timm" if of_vit else "mapped_timm")
    backbone.bottom_up.update(name=name, **settings)
    if "dinov3" in name:
        backbone.bottom_up.model_options = TINY_DINOV3
    backbone.out_channels = cfg.model.encoder.embed_dim
    if of_vit:
        cfg.model.encoder.num_levels = 5
    else:
        backbone.num_groups = 8
    cfg.model.backbone = backbone
    return cfg


def tiny_run_config(*overrides: str):
    return load_config(config_path(CONFIG), [f"train.device={NAME}", *overrides])


@pytest.mark.parametrize("name", MAPS)
def test_maps(name):
    backbone = timm_backbone(name).eval()
    assert isinstance(backbone, Backbone)
    shapes = backbone.output_shape()
    assert {key: shape.stride for key, shape in shapes.items()} == MAPS[name]
    assert backbone.size_divisibility == max(MAPS[name].values())
    maps = backbone(torch.randn(2, 3, 64, 96, device=DEVICE))
    assert {key: tuple(value.shape) for key, value in maps.items()} == {
        key: (2, shape.channels, 64 // shape.stride, 96 // shape.stride)
        for key, shape in shapes.items()
    }
    assert all(value.isfinite().all() for value in maps.values())


def test_maps_with_channels_last_in_timm():
    """Swin's, which have to come out as all others."""
    small = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    backbone = timm_backbone("swin_tiny_patch4_window7_224", model_options=small)
    maps = backbone(torch.randn(1, 3, 64, 96, device=DEVICE))
    assert tuple(maps["c3"].shape) == (1, 32, 8, 12)


@pytest.mark.parametrize("name", MAPS)
def test_step_and_detection(name):
    model = instantiate(model_config(name, drop_path_rate=0.1).model).to(DEVICE)
    randomize(model)
    batch = make_batch(ODD_SIZES)
    assert_complete(model, train_step(model, batch))  # no parameter is idle, as DDP demands
    for found, size in zip(detect(model, batch), ODD_SIZES, strict=True):
        assert found.image_size == size and len(found) > 0


@pytest.mark.parametrize("name", MAPS)
def test_activations_are_computed_again_with_equal_gradients(name):
    images = torch.randn(1, 3, 64, 64, device=DEVICE)
    found = {}
    for checkpointing in (False, True):
        backbone = timm_backbone(name, activation_checkpointing=checkpointing).train()
        calls = []
        for module in backbone.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        sum(value.square().sum() for value in backbone(images).values()).backward()
        gradients = [p.grad for p in backbone.parameters() if p.requires_grad]
        found[checkpointing] = (len(calls), gradients)
    assert found[True][0] > found[False][0]
    for plain, checkpointed in zip(found[False][1], found[True][1], strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_batch_norms_are_frozen_unless_they_are_to_learn():
    frozen = timm_backbone("test_resnet").train()
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    frozen(torch.randn(2, 3, 64, 64, device=DEVICE))
    assert all(value.equal(before[key]) for key, value in frozen.state_dict().items())
    learning = timm_backbone("test_resnet", freeze_batch_norm=False)
    more = sum(p.requires_grad for p in learning.parameters())
    assert more > sum(p.requires_grad for p in frozen.parameters())


def test_normalization_and_weights_follow_the_name():
    cfg = tiny_run_config()
    assert cfg.train.init_checkpoint == "timm://convnext_tiny.fb_in22k_ft_in1k"
    assert instantiate(cfg.model.pixel_mean) == pytest.approx([123.675, 116.28, 103.53])
    cfg = tiny_run_config("model.backbone.bottom_up.name=test_convnext")
    assert cfg.train.init_checkpoint == "timm://test_convnext"
    assert instantiate(cfg.model.pixel_std) == pytest.approx([127.5] * 3)
    assert "timm://" in config_text(cfg)
    assert pixel_mean("resnet10t", 4) == pytest.approx([123.675, 116.28, 103.53, 123.675])


@pytest.fixture
def weights(tmp_path):
    """A classifier of timm as its authors save it."""
    torch.manual_seed(1)
    classifier = timm.create_model("test_convnext")
    save_file(classifier.state_dict(), tmp_path / "model.safetensors")
    return classifier, f"timm://{tmp_path}/model.safetensors"


def shrunk(*overrides: str):
    return shrink(tiny_run_config(*overrides))


def test_weights_of_timm_are_loaded_by_its_own_loader(weights, caplog):
    classifier, address = weights
    model = instantiate(shrunk().model)
    kept = model.encoder.state_dict()
    with caplog.at_level(logging.INFO):
        Checkpointer(model).load(address)
    assert "The license of the weights of timm's test_convnext is apache-2.0." in caplog.text
    own = model.backbone.bottom_up.body
    assert own.stem_0.weight.equal(classifier.stem[0].weight)
    theirs = classifier.stages[3].blocks[0].mlp.fc1.weight
    assert own.stages_3.blocks[0].mlp.fc1.weight.equal(theirs)
    assert all(value.equal(kept[key]) for key, value in model.encoder.state_dict().items())


def test_weights_for_more_channels(weights):
    classifier, address = weights
    model = instantiate(shrunk("data.channels=5", "model.backbone.bottom_up.in_channels=5").model)
    assert model.pixel_mean.numel() == 5
    Checkpointer(model).load(address)
    spread = model.backbone.bottom_up.body.stem_0.weight
    torch.testing.assert_close(spread[:, 4], classifier.stem[0].weight[:, 1] * 3 / 5)


def test_weights_that_do_not_belong_to_the_model(weights, tmp_path):
    _, address = weights
    normalized_otherwise = shrunk()
    normalized_otherwise.model.pixel_std = [58.395, 57.12, 57.375]
    load = {
        "another model": (shrunk(), "timm://resnet50"),
        "no .safetensors file": (shrunk(), f"timm://{tmp_path}/model.pth"),
        "pixel_std": (normalized_otherwise, address),
        "cannot be loaded": (shrunk(), f"timm://{tmp_path}/broken.safetensors"),
        "that of the model is a ResNet": (tiny_config(0), address),
    }
    (tmp_path / "model.pth").write_bytes(b"x")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    for message, (cfg, wrong) in load.items():
        with pytest.raises(CheckpointError, match=message):
            Checkpointer(instantiate(cfg.model)).load(wrong)


def test_weights_under_a_license_of_their_own_are_announced(monkeypatch, caplog):
    backbone = timm_backbone("vit_small_patch16_dinov3.lvd1689m")
    create = partial(timm.create_model, features_only=True)
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, pretrained, pretrained_cfg_overlay, **k: create(name, **k),
    )
    with caplog.at_level(logging.WARNING):
        state = backbone.timm_weights("timm://vit_small_patch16_dinov3.lvd1689m")
    assert state.keys() == backbone.state_dict().keys()
    assert caplog.text.count("is dinov3-license: what is trained from them") == 1


def test_what_timm_does_not_have():
    for message, settings in {
        "no model 'convnext_tny'.*such as convnext_tiny": {"name": "convnext_tny"},
        "one size only": {"name": "coatnet_0_rw_224"},
        "does not take .*unexpected": {"name": "test_convnext", "model_options": {"nonsense": 1}},
        "count every batch twice": {
            "name": "test_resnet",
            "freeze_batch_norm": False,
            "activation_checkpointing": True,
        },
        "multiple of its largest stride, 32": {"name": "test_resnet", "size_divisibility": 48},
    }.items():
        with pytest.raises(ConfigError, match=message):
            TimmBackbone(**settings)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ConfigError, match="pip install timm"):
        TimmBackbone(name="test_resnet")


def test_learning_rates():
    model = instantiate(shrunk().model)
    factor = instantiate(tiny_run_config().optimizer.params.lr_factor_func)
    slow = {name for name, _ in model.named_parameters() if factor(name) < 1}
    of_backbone = {f"backbone.bottom_up.{name}" for name in dict(own_parameters(model))}
    assert of_backbone <= slow

    decay = LearningRateFactor(factor=1.0, layer_decay=0.5, depths=3)
    vit = instantiate(model_config("vit_small_patch16_dinov3").model)
    rates = {name: decay(f"backbone.bottom_up.{name}") for name in dict(own_parameters(vit))}
    assert {rates[name] for name in rates if ".blocks.2." in name} == {0.5}
    assert {rates[name] for name in rates if ".blocks.0." in name} == {0.125}
    rest = {name for name in rates if ".blocks." not in name}
    assert {name for name in rest if "token" in name} and {rates[name] for name in rest} == {0.0625}


def own_parameters(model):
    return model.backbone.bottom_up.named_parameters()


def test_prediction_needs_no_weights_of_timm(tmp_path):
    """A checkpoint of a run, its config with timm's address, and a model that is stripped."""
    cfg = tiny_run_config(
        "model.backbone.bottom_up.name=test_convnext",
        "dataloader.test.mapper.augmentations.short_edge=96",
    )
    address = cfg.train.init_checkpoint
    cfg = shrink(cfg)
    cfg.train.init_checkpoint = address
    save_config(cfg, str(tmp_path / "config.yaml"))
    model = instantiate(cfg.model).to(DEVICE)
    randomize(model)
    names = [f"class {index}" for index in range(cfg.model.num_classes)]
    Checkpointer(model, str(tmp_path), class_names=names).save("model_final")
    predictor = Predictor(tmp_path / "config.yaml", tmp_path / "model_final.pth", device=NAME)
    assert predictor.model.auxiliary is None
    (sample,) = make_batch(((90, 120),), (1,))
    image = sample["image"].permute(1, 2, 0).numpy()
    prepared = predictor.prepare(image)
    (whole,) = detect(model, [{"image": prepared.image, "height": 90, "width": 120}])
    assert predictor(image).scores.equal(whole.scores.cpu())
