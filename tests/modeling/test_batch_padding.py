"""Padding to squares, with and without a mask."""

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.structures import Instances

from co_detr.engine.train import run_evaluation_only
from co_detr.errors import ConfigError
from co_detr.modeling import BatchPadding
from tests.device import DEVICE
from tests.modeling.builders import (
    assert_complete,
    decoder_detections,
    detect,
    evaluating,
    is_inside,
    make_batch,
    randomize,
    shrink,
    tiny_config,
    train_step,
)
from tests.modeling.test_configs import load

SIZES = ((96, 128), (80, 112))
GRAY = 114.0


def build(**padding):
    cfg = tiny_config()
    cfg.model.padding = L(BatchPadding)(**padding)
    torch.manual_seed(0)
    model = instantiate(cfg.model).to(DEVICE)
    randomize(model)
    return model.eval()


def padded_by_hand(batch, side):
    """The same images, made gray squares before the model sees them."""
    result = []
    for sample in batch:
        image = torch.full((3, side, side), GRAY)
        height, width = sample["image"].shape[-2:]
        image[:, :height, :width] = sample["image"]
        gt = sample["instances"]
        gt = Instances((side, side), gt_boxes=gt.gt_boxes, gt_classes=gt.gt_classes)
        result.append({"image": image, "instances": gt})
    return result


def test_default_is_the_largest_size_in_the_mean_color():
    images = build().preprocess(make_batch(SIZES))
    assert images.tensor.shape == (2, 3, 96, 128)
    assert images.image_sizes == list(SIZES)
    assert (images.tensor[1, :, 80:] == 0).all() and (images.tensor[1, :, :, 112:] == 0).all()


def test_masked_square():
    images = build(square_size=160).preprocess(make_batch(SIZES))
    assert images.tensor.shape == (2, 3, 160, 160)
    assert images.image_sizes == list(SIZES)


def test_unmasked_gray_square():
    model = build(square_size=160, value=GRAY, masked=False)
    images = model.preprocess(make_batch(SIZES))
    assert images.tensor.shape == (2, 3, 160, 160)
    assert images.image_sizes == [(160, 160)] * 2
    color = (GRAY - model.pixel_mean) / model.pixel_std
    torch.testing.assert_close(images.tensor[0, :, 96:], color.expand(3, 64, 160))
    memory = model.encode(images)
    assert not memory.padding_mask.any()
    assert (memory.valid_ratios == 1).all()


def test_unmasked_padding_is_part_of_the_image():
    """Losses and predictions are those of images that are gray squares already."""
    model = build(square_size=160, value=GRAY, masked=False)
    batch = make_batch(SIZES)
    by_hand = padded_by_hand(batch, 160)
    plain = build()
    losses, expected = train_step(model, batch), train_step(plain, by_hand)
    assert_complete(model, losses)
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value)
    with evaluating(model), evaluating(plain):
        memories = model.encode(model.preprocess(batch)), plain.encode(plain.preprocess(by_hand))
        assert memories[0].image_sizes == memories[1].image_sizes
        for ours, theirs in zip(model.decode(memories[0]), plain.decode(memories[1]), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_detections_come_out_in_the_original_image():
    model = build(square_size=160, value=GRAY, masked=False)
    batch = make_batch(SIZES)
    in_square = decoder_detections(model, model.preprocess(batch))
    # As if the images had been shrunk: twice as high, three times as wide.
    for sample in batch:
        sample["height"], sample["width"] = 2 * sample["height"], 3 * sample["width"]
    for found, square, size in zip(detect(model, batch), in_square, SIZES, strict=True):
        assert found.image_size == (2 * size[0], 3 * size[1])
        assert is_inside(found)
        expected = square.pred_boxes.clone()
        expected.clip(size)
        inside = expected.nonempty()
        expected.scale(3, 2)
        assert 0 < inside.sum() < len(square)  # some were found in the padding
        torch.testing.assert_close(found.pred_boxes.tensor, expected.tensor[inside])
        torch.testing.assert_close(found.scores, square.scores[inside])


def test_an_image_that_does_not_fit():
    with pytest.raises(ConfigError, match="side of 128 pixels.*square_size is 96"):
        build(square_size=96).preprocess(make_batch(SIZES))


def test_lsj_config_from_files_to_metrics(rectangles):
    """Loader, one training step and evaluation of a config with large-scale jitter."""
    overrides = [override for override in rectangles if "augmentations" not in override]
    cfg = load("co_dino_r50_lsj_12ep", "model.auxiliary=null", *overrides)
    shrink(cfg)
    torch.manual_seed(0)
    model = instantiate(cfg.model).to(DEVICE)
    batch = next(iter(instantiate(cfg.dataloader.train)))
    assert all(max(sample["image"].shape) <= 128 for sample in batch)
    losses = train_step(model, batch)
    assert all(value.isfinite() for value in losses.values())
    assert "AP" in run_evaluation_only(cfg, resume=False)
