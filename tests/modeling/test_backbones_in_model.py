"""The backbones of configs/models/backbones.py inside CoDETR: a training step and detections."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import ImageList

from tests.device import DEVICE
from tests.modeling.backbone_builders import TINY_SWIN, TINY_VIT, backbone_node
from tests.modeling.builders import (
    NUM_CLASSES,
    NUM_QUERIES,
    assert_complete,
    detect,
    make_batch,
    randomize,
    tiny_config,
    train_step,
)

FOUR_STAGES = {"depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 4]}
ODD_SIZES = ((75, 97), (64, 110))


def config_with(name, **settings):
    """A plain detector at test size on a shrunken backbone of the config."""
    cfg = tiny_config(heads=0)
    backbone = backbone_node(name)
    tiny = TINY_SWIN | FOUR_STAGES if "swin" in name else TINY_VIT
    backbone.bottom_up.update(tiny | settings)
    backbone.out_channels = cfg.model.encoder.embed_dim
    if "swin" in name:
        backbone.num_groups = 8
    cfg.model.backbone = backbone
    return cfg


def build(cfg):
    torch.manual_seed(0)
    model = instantiate(cfg.model).to(DEVICE)
    randomize(model)
    return model


def check_step_and_detection(model, steps=2):
    batch = make_batch(ODD_SIZES)
    for seed in range(steps):
        assert_complete(model, train_step(model, batch, seed))
    for found, size in zip(detect(model, batch), ODD_SIZES, strict=True):
        assert found.image_size == size
        assert 0 < len(found) <= 100 and found.scores.isfinite().all()


@pytest.mark.parametrize("name", ["mapped_swin_t", "mapped_swin_s"])
def test_swin_with_odd_image_sizes(name):
    model = build(config_with(name, drop_path_rate=0.1))
    images = ImageList.from_tensors(
        [torch.zeros(3, *size) for size in ODD_SIZES],
        model.backbone.size_divisibility,
        padding_constraints=model.backbone.padding_constraints,
    )
    assert images.tensor.shape[-2:] == (75, 110)
    shapes = [tuple(level_map.shape[-2:]) for level_map in model.backbone(images.tensor).values()]
    assert shapes == [(10, 14), (5, 7), (3, 4), (2, 2)]
    check_step_and_detection(model)


def test_swin_with_five_levels_and_padding_to_32():
    """As Co-DINO uses it: one override more for the level of stride 4."""
    cfg = config_with(
        "mapped_swin_l",
        out_features=["stage0", "stage1", "stage2", "stage3"],
        size_divisibility=32,
        activation_checkpointing=True,
    )
    cfg.model.encoder.num_levels = 5
    model = build(cfg)
    assert list(model.backbone.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
    maps = model.backbone(torch.zeros(1, 3, 96, 128))
    assert [tuple(level_map.shape[-2:]) for level_map in maps.values()][0] == (24, 32)
    check_step_and_detection(model)


@pytest.mark.parametrize("name", ["mapped_vit_l", "mapped_vit_l_lsj"])
def test_vit_with_odd_image_sizes(name):
    square = {"square_size": 128} if name.endswith("lsj") else {}
    cfg = config_with(name, drop_path_rate=0.1, **square)
    assert cfg.model.backbone.bottom_up.activation_checkpointing
    cfg.model.encoder.num_levels = 5
    model = build(cfg)
    check_step_and_detection(model)


@pytest.mark.parametrize("name", ["mapped_swin_t", "mapped_vit_l"])
def test_a_batch_equals_its_images_one_by_one(name):
    cfg = config_with(name)
    if name == "mapped_vit_l":
        cfg.model.encoder.num_levels = 5
    model = build(cfg).double()
    batch = make_batch(((96, 96), (96, 96)))  # equal sizes: tokens at a border see what is padded
    together = detect(model, batch)
    for alone, found in zip(
        (detect(model, [sample])[0] for sample in batch), together, strict=True
    ):
        assert len(found) == len(alone) == min(100, NUM_QUERIES * NUM_CLASSES)
        torch.testing.assert_close(found.scores, alone.scores)
        torch.testing.assert_close(found.pred_boxes.tensor, alone.pred_boxes.tensor)


@pytest.mark.parametrize("name", ["mapped_swin_t", "mapped_vit_l"])
def test_mixed_precision_stays_near_full_precision(name):
    backbone = build(config_with(name)).backbone.eval()
    images = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        full = backbone(images)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            mixed = backbone(images)
    for name, expected in full.items():
        assert (mixed[name].float() - expected).abs().mean() < 0.1 * expected.abs().mean()
